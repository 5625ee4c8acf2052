"""Argument checks of the ops: every tensor is checked here before its address leaves Python."""

from __future__ import annotations

import torch
from torch import Tensor

from pyunlearn.errors import ArgumentError
from pyunlearn.ops._library import host_may_wait

NOTHING = -(1 << 63)
"""An ignore_index that no target equals: no row is ignored."""

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check(x: Tensor, targets: Tensor, *, name: str, softcap: float | None, workspace: int | None) -> None:
    """Raise ArgumentError unless x (..., K) and targets (...) fit together; `name` is the argument's name for x."""
    if not isinstance(x, Tensor) or x.dtype not in FLOATS or x.dim() == 0:
        raise ArgumentError(
            f"{name} must be a float32, bfloat16, float16 or float64 tensor of one dimension or more, "
            f"got {_describe(x)}"
        )
    if x.shape[-1] == 0:
        raise ArgumentError(f"{name} must have at least one column, got shape {tuple(x.shape)}")
    if not isinstance(targets, Tensor) or targets.dtype not in (torch.int64, torch.int32):
        raise ArgumentError(
            f"targets must be an int64 tensor of token ids, got {_describe(targets)}: convert it with .long()"
        )
    if targets.shape != x.shape[:-1]:
        raise ArgumentError(
            f"targets must have one token id for each row of {name}, shape {tuple(x.shape[:-1])}, "
            f"got {tuple(targets.shape)}"
        )
    if targets.device != x.device:
        raise ArgumentError(f"targets are on {targets.device} and {name} on {x.device}: move them to one device")
    if softcap is not None and not softcap > 0:
        raise ArgumentError(f"softcap must be positive, got {softcap}: leave it None for no cap")
    if workspace is not None and not (isinstance(workspace, int) and workspace >= 0):
        raise ArgumentError(f"workspace must be a number of bytes, 0 or more, got {workspace}")


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ArgumentError unless weight (V, D) and bias (V,) fit hidden (..., D)."""
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if type(tensor).__name__ == "DTensor":
            raise ArgumentError(
                f"{name} is a DTensor, of which this process has one shard, and the log-likelihood needs it whole: "
                f"pass {name}.full_tensor(), or use log_likelihood on the model's own logits"
            )
    if not isinstance(weight, Tensor) or weight.dtype not in FLOATS:
        raise ArgumentError(f"weight must be a floating-point tensor of shape (V, D), got {_describe(weight)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ArgumentError(
            f"weight must have shape (V, {hidden.shape[-1]}) to match hidden (..., {hidden.shape[-1]}), "
            f"got {tuple(weight.shape)}"
        )
    if weight.device != hidden.device:
        raise ArgumentError(f"weight is on {weight.device} and hidden on {hidden.device}: move them to one device")
    check_bias(bias, hidden, weight.shape[0], name="bias")


def in_one_dtype(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in the wider of their dtypes, or in autocast's dtype, which leaves float64 alone."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    device = hidden.device.type
    if dtype is not torch.float64 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype)


def check_bias(bias: Tensor | None, rows: Tensor, vocabulary: int, *, name: str) -> None:
    """Raise ArgumentError unless bias has one floating-point number per vocabulary entry, on the device of `rows`."""
    if bias is None:
        return
    if not isinstance(bias, Tensor) or bias.dim() != 1 or bias.dtype not in FLOATS:
        raise ArgumentError(f"{name} must be a floating-point tensor of shape (V,), got {_describe(bias)}")
    if bias.device != rows.device:
        raise ArgumentError(f"{name} is on {bias.device} and the rest on {rows.device}: move them to one device")
    if bias.shape[0] != vocabulary:
        raise ArgumentError(
            f"{name} must have shape ({vocabulary},), one number for each vocabulary entry, got {tuple(bias.shape)}"
        )


def check_reference(
    hidden: Tensor, weight: Tensor, reference_hidden: Tensor, reference_weight: Tensor, reference_bias: Tensor | None
) -> None:
    """Raise ArgumentError unless a reference's hidden states, head and bias fit the model's rows and vocabulary."""
    if not isinstance(reference_hidden, Tensor) or reference_hidden.dtype not in FLOATS or not reference_hidden.dim():
        raise ArgumentError(f"reference_hidden must be a floating-point tensor, got {_describe(reference_hidden)}")
    if reference_hidden.shape[:-1] != hidden.shape[:-1] or reference_hidden.device != hidden.device:
        raise ArgumentError(
            f"reference_hidden must have the rows of hidden, shape {(*hidden.shape[:-1], 'D')} on {hidden.device}, "
            f"got {tuple(reference_hidden.shape)} on {reference_hidden.device}"
        )
    try:
        check_head(reference_hidden, reference_weight, reference_bias)
    except ArgumentError as error:
        raise ArgumentError(f"the reference's {error}") from None
    if len(reference_weight) != len(weight):
        raise ArgumentError(
            f"model and reference must have one vocabulary, got {len(weight)} and {len(reference_weight)} entries: "
            "give a reference of the same family"
        )


def check_per_row(values: Tensor, targets: Tensor, *, name: str) -> None:
    """Raise ArgumentError unless values are floating-point numbers, one for each target."""
    if not isinstance(values, Tensor) or values.dtype not in FLOATS or values.shape != targets.shape:
        raise ArgumentError(
            f"{name} must be a floating-point tensor with one number for each target, shape {tuple(targets.shape)}, "
            f"got {_describe(values)}"
        )
    if values.device != targets.device:
        raise ArgumentError(f"{name} are on {values.device} and targets on {targets.device}: move them to one device")


def check_negligible(negligible: float) -> None:
    """Raise ArgumentError unless `negligible` is a probability below 1."""
    if not isinstance(negligible, (int, float)) or not 0 <= negligible < 1:
        raise ArgumentError(f"negligible must be a probability, 0 or more and below 1, got {negligible!r}")


def check_examples(targets: Tensor, example_index: Tensor, per_example: tuple[Tensor, ...], group_size: int) -> int:
    """Return the number of examples; raise ArgumentError unless the arguments that group rows into examples fit."""
    if targets.dim() != 1:
        raise ArgumentError(
            f"hidden must have shape (N, D) and targets (N,), got targets of shape {tuple(targets.shape)}: flatten both"
        )
    if not isinstance(example_index, Tensor) or example_index.dtype not in (torch.int64, torch.int32):
        raise ArgumentError(f"example_index must be an int64 tensor, got {_describe(example_index)}")
    if example_index.shape != targets.shape or example_index.device != targets.device:
        raise ArgumentError(
            f"example_index must have one number for each target, shape {tuple(targets.shape)} on {targets.device}, "
            f"got {tuple(example_index.shape)} on {example_index.device}"
        )
    if not isinstance(group_size, int) or group_size < 1:
        raise ArgumentError(f"group_size must be a whole number, 1 or more, got {group_size!r}")
    largest, least = -1, 0
    if host_may_wait(targets) and example_index.numel():
        least, largest = torch.stack(torch.aminmax(example_index)).tolist()  # one synchronization
    elif not per_example and not host_may_wait(targets):
        raise ArgumentError(
            "a compiled or captured example_objective cannot count the examples: pass a per-example tensor, "
            "zeros if need be"
        )
    examples = len(per_example[0]) if per_example else -(-(largest + 1) // group_size) * group_size
    for x in per_example:
        if not isinstance(x, Tensor) or x.dim() == 0 or len(x) != examples or x.device != targets.device:
            raise ArgumentError(
                f"per_example must be tensors of {examples} entries on {targets.device}, got {_describe(x)}"
            )
        if x.requires_grad:
            raise ArgumentError("per_example tensors are constants here, and one requires a gradient: detach it")
    if examples % group_size:
        raise ArgumentError(f"{examples} examples do not make whole groups of {group_size}: add or drop some")
    if least < 0 or largest >= examples:
        raise ArgumentError(
            f"example_index must lie in [0, {examples}), got {least if least < 0 else largest}: "
            "does a per_example tensor lack entries?"
        )
    return examples


def ignored(ignore_index: int | None) -> int:
    """Return the target value that marks ignored rows; the sentinel NOTHING if ignore_index is None."""
    return NOTHING if ignore_index is None else ignore_index


def check_targets(targets: Tensor, vocabulary: int, ignore_index: int) -> bool:
    """Raise ArgumentError for targets outside the vocabulary, on the CPU alone; return whether any may be ignored.

    On a GPU the check would synchronize; those targets give NaN there.
    """
    if targets.device.type != "cpu" or targets.numel() == 0:
        return True
    least, largest = torch.aminmax(targets)
    if least >= 0 and largest < vocabulary:
        return 0 <= ignore_index < vocabulary
    wrong = (targets != ignore_index) & ((targets < 0) | (targets >= vocabulary))
    if bool(wrong.any()):
        ignorable = "" if ignore_index == NOTHING else f" or be {ignore_index} (ignored)"
        raise ArgumentError(
            f"targets must lie in [0, {vocabulary}){ignorable}, got {int(targets[wrong][0])}: "
            "does the tokenizer belong to this model?"
        )
    return True


def _describe(x: object) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
