"""Every command imports this first: a missing package then is one line, and a checkout needs no installation."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from jitscale.installation import explain_missing_packages

explain_missing_packages()
