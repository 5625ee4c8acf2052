"""Quantization: does a text come back when the weights are rounded to 8 or 4 bits, as they are for serving?

Unlearning often changes weights by less than the width of a 4-bit step, and rounding then undoes the change.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from pyunlearn.attacks.target import Target, Trial, Unsuited
from pyunlearn.attacks.temporary import temporarily
from pyunlearn.edits.linear_layers import stacks_experts
from pyunlearn.models.inspection import is_matrix

_GROUP = 64  # weights that share a scale
_BLOCK = 32  # the same in GGUF files
_QUICK = "4 bits"  # the format of the quick form

Round = Callable[[Tensor], Tensor]


def rounded(weight: Tensor, bits: int, group: int = _GROUP) -> Tensor:
    """Return a matrix rounded to nearest in groups along its rows, each with a scale of its own, and no zero point.

        scale = max |w| / (2 ** (bits - 1) - 1),    w -> scale * round(w / scale)

    >>> rounded(torch.tensor([[0.7, 0.26, -0.01]]), bits=4, group=3)
    tensor([[0.7000, 0.3000, 0.0000]])
    """
    rows, columns = weight.shape
    padded = nn.functional.pad(weight.float(), (0, -columns % group)).view(rows, -1, group)
    scale = padded.abs().amax(dim=2, keepdim=True) / (2 ** (bits - 1) - 1)
    grid = torch.round(padded / torch.where(scale > 0, scale, 1.0)) + 0.0
    return (scale * grid).view(rows, -1)[:, :columns].to(weight.dtype)


def quantization(target: Target) -> Iterator[Trial]:
    """Round the weights of every linear layer but the head, in each of the formats that are at hand.

    8 and 4 bits: round to nearest in groups of 64. Q8_0 and Q4_0: GGUF's, by the package gguf, embeddings and head at
    Q8_0. nf4: of bitsandbytes. The quick form is 4 bits alone, compared with `Target.compared`.

    Source: Zhang et al. 2024, arXiv 2410.16454.
    """
    modules = {name: m for name, m in target.lm.inner.named_modules() if is_matrix(m) and m.weight.is_floating_point()}
    matrices = {f"{name}.weight": m.weight for name, m in modules.items()}
    transposed = {f"{name}.weight" for name, m in modules.items() if not isinstance(m, nn.Linear)}
    head = target.lm.inner.get_output_embeddings()
    embeddings = {id(m.weight) for m in (head, target.lm.inner.get_input_embeddings()) if m is not None}
    linear = {name: p for name, p in matrices.items() if id(p) not in embeddings}
    if any(p.is_meta for p in target.lm.module.parameters()):
        raise Unsuited("parts of the model are offloaded")
    if hasattr(target.lm.module, "peft_config"):
        raise Unsuited("weights are rounded after an adapter is merged (--merge), and this one is not")
    others = ((n, p) for n, p in target.lm.inner.named_parameters() if n not in matrices)
    if stacked := next((n for n, p in others if stacks_experts(n, p)), None):
        raise Unsuited(f"{stacked} stacks the matrices of several experts in one parameter, which is not rounded")
    if not linear:
        raise Unsuited("its weights are quantized already, or it has no linear layers")
    quick = target.config.is_quick("quantization")
    table = {n: p for n, p in target.lm.inner.named_parameters() if id(p) in embeddings and p.is_floating_point()}
    formats = {_QUICK: (partial(rounded, bits=4), None)} if quick else _formats(linear, transposed)
    with temporarily(linear | table) as saved:
        for name, (of_linear, of_table) in formats.items():
            target.bar.say(f"rounding the weights to {name}")
            with torch.no_grad():
                for key, p in (linear | table).items():
                    change = of_linear if key in linear else of_table
                    weight = saved[key].to(p.device)
                    if change is not None:
                        weight = change(weight.T).T if key in transposed else change(weight)
                    p.copy_(weight)
            yield target.trial(f"quantization, {name}", quick=quick, format=name)


def _formats(linear: dict[str, nn.Parameter], transposed: set[str]) -> dict[str, tuple[Round, Round | None]]:
    """Return name -> how linear layers are rounded, and how embeddings and head are; None: not at all."""
    formats: dict[str, tuple[Round, Round | None]] = {
        "8 bits": (lambda w: rounded(w, 8), None),
        "4 bits": (lambda w: rounded(w, 4), None),
    }
    in_blocks = all(p.shape[int(name not in transposed)] % _BLOCK == 0 for name, p in linear.items())
    if in_blocks and _has_gguf():
        formats |= {"GGUF Q8_0": (_gguf("Q8_0"), _gguf("Q8_0")), "GGUF Q4_0": (_gguf("Q4_0"), _gguf("Q8_0"))}
    if importlib.util.find_spec("bitsandbytes"):
        formats["nf4"] = (_nf4, None)
    return formats


def _has_gguf() -> bool:
    """Return whether the package gguf can be imported: early versions need another one, and do not say so."""
    try:
        importlib.import_module("gguf")
    except ImportError:
        return False
    return True


def _gguf(name: str) -> Round:
    import gguf

    kind = gguf.GGMLQuantizationType[name]

    def change(weight: Tensor) -> Tensor:
        packed = gguf.quants.quantize(weight.detach().float().cpu().contiguous().numpy(), kind)
        return torch.from_numpy(gguf.quants.dequantize(packed, kind)).to(weight)

    return change


def _nf4(weight: Tensor) -> Tensor:
    from bitsandbytes import functional

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch, about what it calls
        packed, state = functional.quantize_4bit(weight.detach().contiguous(), blocksize=_GROUP, quant_type="nf4")
        return functional.dequantize_4bit(packed, state).to(weight.dtype).view_as(weight)
