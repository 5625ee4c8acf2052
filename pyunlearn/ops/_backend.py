"""Which implementation of the row kernels runs: cuda (C++/CUDA), cpu (C++) or reference (PyTorch). Chosen once.

PYUNLEARN_BACKEND=cuda | cpu | reference overrides the choice: `reference` everywhere, `cpu` keeps CUDA tensors on the reference,
`cuda` insists on the CUDA kernels and is an error where they cannot run.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import cache, partial, wraps
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyunlearn.ops import _kernels, reference

try:
    from pyunlearn import _C  # type: ignore[attr-defined]
except ImportError as error:  # a source tree that was not built, or a platform without a compiler
    _C = None
    _missing = str(error)
    if os.environ.get("PYUNLEARN_BACKEND", "") != "reference":
        warnings.warn(
            f"pyunlearn's compiled kernels are not here ({_missing}); plain PyTorch runs instead, slower. `pip install .` builds them.",
            stacklevel=2,
        )


class Backend(NamedTuple):
    """What runs for CPU tensors and for CUDA tensors ("cpu", "cuda" or "reference"), and why."""

    cpu: str
    cuda: str
    why: str


def build_info() -> dict[str, Any]:
    """What the compiled extension was built with, and what it sees; empty if it is missing."""
    return dict(_C.build_info()) if _C is not None else {}


def extension() -> Any:
    """The compiled extension, for kernels that have no counterpart on the other backends."""
    return _C


@cache
def chosen() -> Backend:
    """The backend of this process. Raises ValueError for an unknown or impossible PYUNLEARN_BACKEND."""
    wanted = os.environ.get("PYUNLEARN_BACKEND", "").strip().lower()
    if wanted not in ("", "cuda", "cpu", "reference"):
        raise ValueError(f"PYUNLEARN_BACKEND must be cuda, cpu or reference, got {wanted!r}: correct it or unset it")
    if wanted == "reference":
        return Backend("reference", "reference", "PYUNLEARN_BACKEND=reference")
    if _C is None:
        if wanted:
            raise ValueError(
                f"PYUNLEARN_BACKEND={wanted} needs the compiled extension, which is not here: run `pip install .`"
            )
        return Backend("reference", "reference", f"the compiled extension is missing: {_missing}")
    if wanted == "cpu":
        return Backend("cpu", "reference", "PYUNLEARN_BACKEND=cpu")
    problem = _cuda_problem() or _wrong_on_this_card()
    if wanted == "cuda" and problem:
        raise ValueError(f"PYUNLEARN_BACKEND=cuda, but {problem}: mend that, or unset it")
    if problem:
        if torch.cuda.is_available():
            warnings.warn(
                f"pyunlearn's CUDA kernels are not used: {problem}. Plain PyTorch runs on the card instead.",
                stacklevel=3,
            )
        return Backend("cpu", "reference", problem)
    return Backend("cpu", "cuda", "compiled kernels found for both")


def _cuda_problem() -> str | None:
    info = build_info()
    if not info.get("cuda_architectures"):
        return "the extension was built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if info["cuda_problem"]:
        return str(info["cuda_problem"])
    oldest = min(int(a) for a in info["cuda_architectures"].split())
    major, minor = torch.cuda.get_device_capability()
    if major * 10 + minor < oldest:
        return f"the card has compute capability {major}.{minor}, and the kernels need {oldest / 10:.1f} or later"
    return None


@torch.no_grad()
def _wrong_on_this_card(device: str = "cuda") -> str | None:
    """Runs every CUDA kernel once on small blocks and compares it with the definition: a wrong number must not pass silently.

    The widths are those at which another kernel takes the row: a warp, a block that holds it, a block that reads it twice. 5003 and 9001 leave rows
    unaligned.
    """
    generator = torch.Generator().manual_seed(0)
    dtypes = ((torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3))
    for (dtype, tolerance), columns in product(dtypes, (1024, 5003, 9001)):
        x = torch.randn(5, columns, generator=generator).to(device, dtype)
        y = torch.randn(5, columns, generator=generator).to(device)
        try:
            found = [_self_test(run, x, y) for run in (_C, reference)]
        except RuntimeError as error:
            return f"they failed on this card: {str(error).splitlines()[0]}"
        if not torch.allclose(found[0], found[1], rtol=tolerance, atol=tolerance):
            return "they gave wrong numbers in a self-test on this card (please report it, with `pyunlearn info`)"
    return None


def _self_test(run: Any, x: Tensor, y: Tensor) -> Tensor:
    """Everything that the kernels of `run` make of x and y, in one vector."""
    targets = torch.tensor([0, 1023, 7, 2000, 512], device=x.device)
    coefficients = torch.linspace(-1, 1, 5, device=x.device)

    def on_x(kernel: Callable[..., None]) -> Callable[..., None]:
        return partial(kernel, run, x, 0, None, 0.5, 4.0, targets)

    def on_both(kernel: Callable[..., None]) -> Callable[..., None]:
        return partial(kernel, run, x.float()[:, :1024], y[:, :1024], 0, (None, None), 0.5, 4.0, targets, 1.0)

    maximum, total = torch.full((2, 5), -torch.inf, device=x.device), torch.zeros(2, 5, device=x.device)
    target_logit, block_maximum = torch.zeros(5, device=x.device), torch.empty(5, device=x.device)
    kept, out = torch.empty_like(x), torch.empty_like(x)
    on_x(_kernels.statistics)(maximum[0], total[0], target_logit, kept, block_maximum)
    log_likelihood = (target_logit - maximum[0]) - total[0].log()
    on_x(_kernels.gradient)(False, maximum[0], total[0], log_likelihood, coefficients, block_maximum, out
    )  # fmt: skip
    found = [maximum[0], total[0], target_logit, kept.flatten().clone(), out.flatten().clone()]
    again, largest, sums = torch.zeros_like(total[0]), torch.full_like(total[0], -torch.inf), torch.zeros_like(total[0])
    on_x(_kernels.statistics)(largest, sums, again)  # without keeping
    of_kept = partial(_kernels.gradient, run, kept, 0, None, 0.5, 4.0, targets)
    of_kept(True, maximum[0], total[0], log_likelihood, coefficients, block_maximum, kept)
    found += [largest, sums, again, kept.flatten()]
    moments, rank = torch.zeros(2, 5, device=x.device), torch.zeros(5, dtype=torch.int64, device=x.device)
    on_x(_kernels.token_statistics)(target_logit, maximum[1], total[1], moments, target_logit, rank)
    found += [total[1], moments.flatten(), rank]
    cross = torch.zeros(5, device=x.device)
    tops, totals = torch.full_like(maximum, -torch.inf), torch.zeros_like(total)
    on_both(_kernels.kl_statistics)(tops, totals, cross)
    on_both(_kernels.kl_gradient)(tops, totals, coefficients, out[:, :1024])
    return torch.cat([f.float() for f in (*found, totals.flatten(), cross, out[:, :1024].flatten())])


def kernels_for(x: Tensor) -> str:
    """The backend that serves tensors on this device and of this dtype."""
    if x.device.type == "cpu":
        return chosen().cpu
    if x.device.type == "cuda" and x.dtype is not torch.float64:
        return chosen().cuda
    return "reference"


def multiplies_bf16(x: Tensor) -> bool:
    """Whether our own product of bfloat16 operands with a float32 result serves x: csrc/bf16_products.h."""
    return x.dtype is torch.bfloat16 and kernels_for(x) == "cpu" and bool(build_info()["bf16_products"])


def _chosen(kernel: Callable[..., None]) -> Callable[..., None]:
    """The kernel on the backend that serves its first tensor."""

    @wraps(kernel)
    def call(x: Tensor, *arguments: Any) -> None:
        kernel(reference if kernels_for(x) == "reference" else _C, x, *arguments)

    return call


statistics = _chosen(_kernels.statistics)
gradient = _chosen(_kernels.gradient)
token_statistics = _chosen(_kernels.token_statistics)
kl_statistics = _chosen(_kernels.kl_statistics)
kl_gradient = _chosen(_kernels.kl_gradient)
bf16_product = partial(_kernels.bf16_product, _C)
