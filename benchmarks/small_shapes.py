"""Every CUDA kernel on small shapes, for compute-sanitizer: `python -m benchmarks.small_shapes`.

The calls are ordered by what they tell, and none starts once --seconds have passed: a tool that makes each call a
hundred times slower still ends in time. Results are not looked at beyond their being finite; the tests do that.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

import torch

SHAPES = ((300, 72, 1003), (300, 1544, 515))
"""(N, D, V): partial tiles in every direction, in short k-steps and in long ones."""


def calls(device: str, extra: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Run one call after the other, and yield its name and a number of its result."""
    for options in ({}, {"workspace": 0}, {"softcap": 4.0, "logit_scale": 0.5}):
        for shape in SHAPES:
            yield from _calls(*shape, torch.bfloat16, device, options)
    for dtype in (torch.float16, torch.float32) if extra else ():
        for options in ({}, {"softcap": 4.0, "logit_scale": 0.5, "workspace": 0}):
            for shape in SHAPES:
                yield from _calls(*shape, dtype, device, options)


def _calls(
    n: int, d: int, v: int, dtype: torch.dtype, device: str, options: dict[str, Any]
) -> Iterator[tuple[str, torch.Tensor]]:
    from pyunlearn.ops import kl_divergence, linear_log_likelihood, log_likelihood, token_statistics
    from pyunlearn.ops import weighted_log_likelihood as weighted

    g = torch.Generator().manual_seed(0)
    h, w, other, bias = (
        torch.randn(*s, generator=g).to(device, dtype).requires_grad_() for s in ((n, d), (v, d), (n, d), (v,))
    )
    t = torch.randint(v, (n,), generator=g).to(device)
    masked, c = t.where(t % 5 > 0, -100), torch.linspace(-1, 1, n, device=device)
    if "softcap" in options:
        options = {**options, "bias": bias}
    name = f"{n} x {d} x {v}, {str(dtype).removeprefix('torch.')}, {', '.join(map(str, options)) or 'plain'}: "
    yield name + "linear_log_likelihood", _gradient(linear_log_likelihood(h, w, t, **options).sum(), h)
    yield name + "token_statistics", token_statistics(h, w, masked, **options).entropy.sum()
    yield name + "weighted_log_likelihood", _gradient(weighted(h, w, masked, c, **options), h)
    yield name + "kl_divergence", _gradient(kl_divergence(h, w, other, w.detach(), masked, **options).sum(), h)
    if "workspace" not in options:
        logits = (h @ w.T).detach().requires_grad_()
        yield name + "log_likelihood", _gradient(log_likelihood(logits, masked).sum(), logits)


def _gradient(loss: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    loss.backward()
    assert leaf.grad is not None
    return leaf.grad.float().sum()


def main() -> None:
    """Run the calls, with the Hopper kernels wherever the GPU has them, their self-test passed or not."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.small_shapes", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--seconds", type=float, default=30.0, help="no call starts later than this")
    parser.add_argument("--extra", action="store_true", help="float16 and float32 as well")
    parser.add_argument("--portable", action="store_true", help="without the Hopper kernels")
    options = parser.parse_args()
    from pyunlearn.ops import _backend
    from pyunlearn.ops.hopper import dispatch

    if options.device == "cuda":
        hopper = _backend.build_info().get("hopper") and not _backend.extension().hopper_unavailable()
        dispatch.run_on = lambda device: bool(hopper) and not options.portable
        print("Hopper kernels" if hopper and not options.portable else "portable kernels", flush=True)
    began, done = time.perf_counter(), 0
    for name, number in calls(options.device, options.extra):
        if not number.isfinite():
            raise SystemExit(f"{name}: {number.item()}")
        done += 1
        took = time.perf_counter() - began
        print(f"{took:6.1f} s  {name}", flush=True)
        if took > options.seconds:
            print(f"stopped after {done} calls, as {options.seconds:g} s have passed")
            return
    print(f"all {done} calls ran")


if __name__ == "__main__":
    main()
