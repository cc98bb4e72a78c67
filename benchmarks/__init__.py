"""Measure the worker against a baseline worker: `make bench`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "bench"  # photographs and serving artifacts; git-ignored, made once

# The seeded weights and the worker processes come from the tests.
if str(ROOT / "tests") not in sys.path:
    sys.path.append(str(ROOT / "tests"))
