"""Memory of a run by part: what is there through all steps, and what the largest pass takes in addition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyunlearn.data import Tokens
from pyunlearn.models.devices import bfloat16_requested
from pyunlearn.models.footprint import Runtime, first_scoring, scoring, traced, training
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.unlearning.adam import Adam
from pyunlearn.unlearning.config import UnlearnConfig
from pyunlearn.unlearning.machines import Machine

TRAINED, OTHERS = "weights that are trained", "weights that are not"
GRADIENTS = "gradients"
MOMENTS = "second moments"
RESTS = "rests of 16-bit weights"
UNROUNDED = "weights before rounding (gguf_like)"
ACCEPTED = "last accepted state"
CHECKPOINT = "moments for the checkpoint"
MASK = "mask"
BEFORE_FINE_TUNING = "weights before fine-tuning (robust)"
FINE_TUNING = "second moments and rests of fine-tuning (robust)"
ACTIVATIONS = "activations of a pass"
HEAD = "output head of a pass"
EXTRA = "scores and updates, beyond a pass"
GAPS = "allocator's gaps and buffers"

_GAPS = 0.55
"""Bytes that the C library's heap has in gaps for each byte that a pass stores in small tensors: on Linux, measured."""
_BUFFERS = 90 * 10**6
"""Bytes of the kernels' buffers and of the run's other objects on a CPU, measured."""


class Part(NamedTuple):
    """One row of the table of memory."""

    name: str
    device: int
    """Bytes on the device that trains."""
    main: int = 0
    """Bytes in the main memory, where the device is a GPU."""


class Memory(NamedTuple):
    """Memory of a run at its peak, by part."""

    parts: tuple[Part, ...]
    operations_trained: float
    """Floating-point operations of a step for each token id that it trains on."""
    operations_scored: float
    """The same of a pass that is only scored."""

    @property
    def device(self) -> int:
        """Bytes on the device that trains."""
        return sum(part.device for part in self.parts)

    @property
    def main(self) -> int:
        """Bytes in the main memory, where the device is a GPU."""
        return sum(part.main for part in self.parts)


def static_parts(module: nn.Module, config: UnlearnConfig, device: str, *, checkpoint: bool) -> list[Part]:
    """Return the parts that are there through all steps; they follow from the dtypes alone.

    Args:
        module: on the meta device; what requires a gradient is trained.
        config: the settings.
        device: type of the device that trains.
        checkpoint: whether the run stores the moments of the last accepted state.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    own = {id(p) for p in trained}
    others = [t for t in [*module.parameters(), *module.buffers()] if id(t) not in own]
    rounds = config.gguf_like is not None and not hasattr(module, "peft_config")
    plain = [p.numel() * rest_size(p.dtype) for p in trained]
    name, rests = (UNROUNDED, [4 * p.numel() for p in trained]) if rounds else (RESTS, plain)
    precise = [p.numel() * max(4, p.dtype.itemsize) for p in trained]
    moments = [p.numel() for p in trained] if config.moments_in_8bit else precise
    accepted = [*map(_bytes, trained), *rests]
    parts = [
        Part(TRAINED, sum(map(_bytes, trained))),
        Part(OTHERS, sum(map(_bytes, others))),
        Part(GRADIENTS, sum(map(_bytes, trained))),
        _on_host(MOMENTS, moments, device) if config.offload_optimizer else Part(MOMENTS, sum(moments)),
        _on_host(name, rests, device) if config.offload_optimizer else Part(name, sum(rests)),
        _on_host(ACCEPTED, accepted, device),
        _on_host(CHECKPOINT, moments if checkpoint else [], device),
        Part(MASK, sum(p.numel() for p in trained) if config.mask is not None else 0),
    ]
    if config.robust:
        before = sum(map(_bytes, trained))  # not pinned
        parts.append(Part(BEFORE_FINE_TUNING, *((0, before) if device == "cuda" else (before, 0))))
        state, offload = [*precise, *plain], config.offload_optimizer
        parts.append(_on_host(FINE_TUNING, state, device) if offload else Part(FINE_TUNING, sum(state)))
    return [part for part in parts if part.device or part.main]


def rest_size(dtype: torch.dtype) -> int:
    """Return the bytes of a weight's rest, see `Adam`."""
    return {torch.bfloat16: 2, torch.float16: 4}.get(dtype, 0)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _on_host(name: str, sizes: Sequence[int], device: str) -> Part:
    """Return a part that stands in the main memory; pinned memory is allocated in powers of two."""
    if device == "cuda":
        return Part(name, 0, sum(1 << (size - 1).bit_length() for size in sizes if size))
    return Part(name, sum(sizes))


def memory_of(
    lm: LanguageModel, tokens: dict[str, list[Tokens]], config: UnlearnConfig, machine: Machine, parts: list[Part]
) -> Memory:
    """Return the memory of a run: the parts that are always there, and those of its largest passes.

    Args:
        lm: a model of `outline`.
        tokens: role -> texts.
        config: the settings.
        machine: where it runs.
        parts: from `static_parts`.
    """
    runtime = _runtime(lm, config, machine)
    size = config.micro_batch_size or config.batch_size
    batches = largest_batches(tokens, config)
    step = training(lm, batches, runtime)
    scored = _longest([t for each in tokens.values() for t in each], 2 * min(size, config.batch_size))
    score = scoring(lm, scored, runtime)
    first = first_scoring(lm, scored[0], runtime)

    sizes = {part.name: part.device for part in parts}
    passes = step.peak - sizes[GRADIENTS]
    head = min(step.head, max(0, passes))
    activations = max(0, passes - head)
    extra = max(score.peak, update_bytes(lm.module)) - (head + activations)
    before = sizes[TRAINED] + sizes.get(OTHERS, 0) + max(first.peak, score.peak)
    extra = max(extra, before - sum(sizes.values()) - head - activations, 0)
    rows = [Part(ACTIVATIONS, activations), Part(HEAD, head), Part(EXTRA, extra)]
    if machine.device == "cpu":
        whole = training(lm, batches, runtime._replace(recomputed=False)) if runtime.recomputed else step
        rows.append(Part(GAPS, _BUFFERS + int(_GAPS * whole.small)))
    return Memory(
        (*parts, *(row for row in rows if row.device)),
        step.operations / _ids(batches),
        score.operations / _ids([scored]),
    )


def _runtime(lm: LanguageModel, config: UnlearnConfig, machine: Machine) -> Runtime:
    first = next(lm.module.parameters()).dtype
    mixed = bfloat16_requested() or (machine.device == "cuda" and machine.bfloat16)
    mixed = mixed and first == torch.float32
    return Runtime(machine.device, config.workspace, config.gradient_checkpointing, mixed)


def largest_batches(tokens: dict[str, list[Tokens]], config: UnlearnConfig) -> list[list[Tokens]]:
    """Return the longest texts of one optimizer step, in micro-batches, two of each role at most."""
    size = config.micro_batch_size or config.batch_size
    batches: list[list[Tokens]] = []
    for texts in (tokens["forget"], texts_of_retain_loss(tokens, config)):
        longest = _longest(texts, config.batch_size)
        batches += [longest[i : i + size] for i in range(0, len(longest), size)][:2]
    return batches


def texts_of_retain_loss(tokens: dict[str, list[Tokens]], config: UnlearnConfig) -> list[Tokens]:
    """Return the texts of the retain loss; none where there is no such loss.

    Without a retain set the run holds text that the model writes; forget texts stand in for it.
    """
    if config.retain_loss is None or config.retain_weight == 0:
        return []
    return tokens.get("retain") or tokens["forget"]


def _longest(tokens: Sequence[Tokens], count: int) -> list[Tokens]:
    return sorted(tokens, key=lambda t: -len(t))[:count]


def _ids(batches: Sequence[Sequence[Tokens]]) -> int:
    return sum(len(t) for batch in batches for t in batch)


def update_bytes(module: nn.Module) -> int:
    """Return the bytes of the optimizer's temporary tensors, traced on the largest trained parameter."""
    largest = max((p for p in module.parameters() if p.requires_grad), key=lambda p: p.numel())
    p = nn.Parameter(torch.empty_like(largest))
    optimizer = Adam([p], 1e-3)
    p.grad = torch.empty_like(p)
    optimizer.step()  # makes the moments
    with traced([p, p.grad, *optimizer.state[p].values(), *optimizer.rests.values()]) as trace:
        optimizer.step()
    return trace.footprint.peak
