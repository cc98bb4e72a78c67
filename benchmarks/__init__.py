"""What the worker gains over a plain one, measured by `make bench`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "bench"  # photographs and serving artifacts; git-ignored, made once

# The seeded weights and the worker processes are the tests' own.
if str(ROOT / "tests") not in sys.path:
    sys.path.append(str(ROOT / "tests"))
