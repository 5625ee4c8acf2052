"""Benchmarks: `python -m benchmarks` runs all, `python -m benchmarks log_likelihood --device cuda` one. Correctness first, then time."""
