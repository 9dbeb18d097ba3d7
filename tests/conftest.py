"""What all tests share."""

from __future__ import annotations

import os

# Before torch is imported: sums must not depend on how many threads shared them.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
