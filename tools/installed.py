"""Every command imports this module first: it makes a checkout importable, and reports a missing package in a line."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from jitscale.installation import explain_missing_packages

explain_missing_packages()
