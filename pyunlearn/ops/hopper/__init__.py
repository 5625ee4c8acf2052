"""The kernels for compute capability 9.0 (H100, H200); mirrors csrc/cuda/hopper.

kernels.py calls them, dispatch.py decides whether they serve a call, selftest.py compares them with the definition.
"""

from pyunlearn.ops.hopper.dispatch import run_on, serves, status
from pyunlearn.ops.hopper.kernels import differentiate, score, token_statistics

__all__ = ["differentiate", "run_on", "score", "serves", "status", "token_statistics"]
