"""The kernels for compute capability 9.0 (H100, H200); mirrors csrc/cuda/hopper.

kernels.py calls them, dispatch.py decides whether they serve a call. At their first use trial.py has selftest.py
compare them with the definition, and record.py remembers the outcome.
"""

from pyunlearn.ops.hopper.dispatch import run_on, serves, status
from pyunlearn.ops.hopper.kernels import differentiate, score, token_statistics

__all__ = ["differentiate", "run_on", "score", "serves", "status", "token_statistics"]
