"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import (
    bench_audit,
    bench_find,
    bench_kl_divergence,
    bench_linear_log_likelihood,
    bench_token_statistics,
)
from benchmarks.harness import RESULTS

BENCHMARKS = {
    "log_likelihood": bench_linear_log_likelihood,
    "token_statistics": bench_token_statistics,
    "kl_divergence": bench_kl_divergence,
    "audit": bench_audit,
    "find": bench_find,
}


def main() -> None:
    """Parse the options and run the requested benchmarks."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"which (default: all): {', '.join(BENCHMARKS)}")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--dtypes",
        nargs="+",
        default=None,
        help="such as float32 bfloat16 (default: both on the CPU, bfloat16 on a GPU)",
    )
    parser.add_argument("--shapes", nargs="+", default=None, help="N,D,V, such as 1024,576,49152")
    parser.add_argument("--rounds", type=int, default=None, help="timed rounds after warm-up; the median counts")
    parser.add_argument("--workspace", type=int, default=None, help="MiB for pyunlearn (default: its own)")
    parser.add_argument(
        "--modes",
        nargs="+",
        default=["full", "frozen", "forward", "workspace"],
        choices=["full", "frozen", "forward", "workspace"],
        help="of log_likelihood: both gradients, a frozen head, no gradient, both gradients in 64 MiB to unlimited "
        "(default: all)",
    )
    parser.add_argument(
        "--masked",
        nargs="+",
        default=["0", "60", "tofu"],
        help="of log_likelihood: per cent of the rows, or tofu for a padded batch of TOFU's own lengths "
        "(default: all three)",
    )
    parser.add_argument("--save", action="store_true", help="write the results as JSON")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of the results of --save (default: benchmarks/results)"
    )
    options = parser.parse_args()
    for name in options.names or BENCHMARKS:
        if name not in BENCHMARKS:
            parser.error(f"no benchmark {name!r}; choose from {', '.join(BENCHMARKS)}")
        BENCHMARKS[name].run(options)


if __name__ == "__main__":
    main()
