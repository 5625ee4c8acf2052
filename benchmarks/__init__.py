"""Benchmarks: `python -m benchmarks` runs all, `python -m benchmarks log_likelihood --device cuda` one. Correctness first, then time."""

import sys
from pathlib import Path

# Python puts the current folder first: at the repository's root that is the source tree, which has no compiled kernels. What is timed is the
# installed package.
_ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != _ROOT] + [str(_ROOT)]
