"""Benchmarks, correctness first, then time.

`python -m benchmarks` runs all, `python -m benchmarks log_likelihood --device cuda` one.
"""

import sys
from pathlib import Path

# Python puts the current folder first: at the repository's root that is the source tree, which has no compiled kernels.
# The installed package is timed.
_ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != _ROOT] + [str(_ROOT)]
