"""Training steps: of any shape; or of a few fixed shapes, which a GPU replays as CUDA graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyunlearn.data import TokenBatch, Tokens, collate
from pyunlearn.errors import first_line
from pyunlearn.models.language_model import LanguageModel

Step = Callable[[Sequence[Tokens]], Tensor]
"""Takes one optimizer step on a batch; returns the loss before it, nats per token."""
Capture = Callable[[Callable[[], None], Callable[[], Tensor]], Callable[[], Tensor]]
"""Gets a function that clears the gradients and one that takes a step; returns a call that repeats the step."""
_WARM_UP = 3  # steps before a capture, in which libraries choose their kernels and allocate their workspaces


def training_step(lm: LanguageModel, optimizer: torch.optim.Optimizer, batch_size: int) -> Step:
    """Return the step of a training: on a GPU a graph for each of a few shapes, elsewhere the plain one.

    The graphs share one pool of memory, in which each uses again what those before it have freed.
    """
    if lm.device.type == "cuda":
        return FixedSteps(lm, optimizer, batch_size, partial(captured, pool=torch.cuda.graph_pool_handle()))
    return PlainStep(lm, optimizer)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of each group, `scale` times `rate`: in place where it is a tensor, which a graph reads."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate * group["scale"])
        else:
            group["lr"] = rate * group["scale"]


class PlainStep:
    """One optimizer step on a batch as wide as its longest example: the definition, and the step on a CPU.

    Gradients are clipped to norm 1; the loss is the mean over the batch's tokens.
    """

    def __init__(self, lm: LanguageModel, optimizer: torch.optim.Optimizer) -> None:
        self.lm, self.optimizer = lm, optimizer

    def __call__(self, tokens: Sequence[Tokens]) -> Tensor:
        self.optimizer.zero_grad()
        return self.take(self.lm.collate(tokens))

    def take(self, batch: TokenBatch, weights: Tensor | None = None) -> Tensor:
        """Take the step, where there are no gradients yet; `weights` (n,) of the tokens, by default equal ones."""
        with torch.autocast("cuda", torch.bfloat16, enabled=self.lm.device.type == "cuda"):
            values = self.lm.likelihood(batch)  # (n,)
            loss = -(values.mean() if weights is None else (values * weights).sum())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.lm.module.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()


class Fixed(NamedTuple):
    """A batch of a fixed shape: B examples of T tokens, and B * T scored ones, most of them real."""

    batch: TokenBatch
    weights: Tensor
    """(B * T,) 1 / n for the n real tokens, 0 for what fills up."""

    def tensors(self) -> list[Tensor]:
        """Return all tensors, in order."""
        return [x for x in (*vars(self.batch).values(), self.weights) if x is not None]


class FixedSteps:
    """The same step on batches of a few fixed shapes, in buffers that stay where they are.

    Equal to `PlainStep` but for rounding; with dropout another draw of its noise, since padding has some too.

    Args:
        lm: the model, in training mode.
        optimizer: for graphs, one that can be captured, with a tensor as learning rate.
        batch_size: examples of the largest batch.
        capture: makes the call for a shape; the steps that it takes leave no trace in weights, optimizer or random
            state. Where it fails, the plain step takes over, with a warning, and what was captured before is freed.
            None: each step runs as it is.
    """

    def __init__(
        self, lm: LanguageModel, optimizer: torch.optim.Optimizer, batch_size: int, capture: Capture | None = None
    ) -> None:
        self.plain, self.batch_size, self.capture = PlainStep(lm, optimizer), batch_size, capture
        self.shapes: dict[int, tuple[Fixed, Callable[[], Tensor]]] = {}
        self.failed = False

    def __call__(self, tokens: Sequence[Tokens]) -> Tensor:
        lm = self.plain.lm
        width = width_of(tokens, lm.context_length)
        new = fixed_batch(lm, tokens, self.batch_size, width)
        with torch.cuda.device_of(next(lm.module.parameters())):
            if width not in self.shapes and not self.failed:
                self._add(width, new)
            if self.failed:
                return self.plain(tokens)
            buffers, call = self.shapes[width]
            for buffer, values in zip(buffers.tensors(), new.tensors(), strict=True):
                buffer.copy_(values)
            return call()

    def _add(self, width: int, first: Fixed) -> None:
        """Make the buffers and the call for a width; `first` fills them meanwhile."""
        plain, device = self.plain, self.plain.lm.device
        buffers = Fixed(first.batch.to(device), first.weights.to(device))

        def clear() -> None:
            plain.optimizer.zero_grad()

        def take() -> Tensor:
            return plain.take(*buffers)

        def call() -> Tensor:
            clear()
            return take()

        if self.capture is not None:
            before = _State(plain)
            try:
                call = self.capture(clear, take)
            except RuntimeError as error:
                self.failed = True
                self.shapes.clear()  # with the graphs of other widths, which no step replays any more
                clear()  # gradients are in the memory of a graph
                warnings.warn(
                    f"the training step could not be captured as a CUDA graph ({first_line(error)}): each step is run "
                    "by itself, which is slower",
                    stacklevel=4,
                )
            before.restore()
        if not self.failed:
            self.shapes[width] = buffers, call


def captured(clear: Callable[[], None], take: Callable[[], Tensor], pool: Any = None) -> Callable[[], Tensor]:
    """Capture a step as a CUDA graph, after steps to warm up on a stream of their own.

    Graphs of one `pool` (of `torch.cuda.graph_pool_handle`; None: one for this graph alone) share memory. They are
    replayed one after the other, and nothing but the loss, which is copied, is read after a replay.

    Gradients are in the graph's own memory: without any before the capture, each replay writes them from the beginning.
    The random state is that of the default generator, which torch registers with the graph: a replay draws from where
    the generator is, and advances it.

    Raises RuntimeError where an operation cannot be captured.
    """
    present, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(present)
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            clear()
            take()
    present.wait_stream(side)
    clear()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool):
            loss = take()
    except RuntimeError:
        # torch leaves the stream of the capture in place, and a generator that refuses to draw outside of a capture
        torch.cuda.set_stream(present)
        fresh = torch.Generator(device="cuda").graphsafe_get_state()
        torch.cuda.default_generators[torch.cuda.current_device()].graphsafe_set_state(fresh)
        raise

    def replay() -> Tensor:
        graph.replay()
        return loss.clone()  # the next replay overwrites it

    return replay


def width_of(tokens: Sequence[Tokens], most: int | None) -> int:
    """Return the least of 6, 8, 12, 16, 24, 32, 48, ... that no example exceeds, or `most`, the model's limit.

    >>> [width_of([Tokens(tuple(range(n)), 1)], 40) for n in (5, 7, 17, 25, 33)]
    [6, 8, 24, 32, 40]
    """
    longest = max(max(len(t.ids), len(t.written)) for t in tokens)
    power = max(8, 1 << (longest - 1).bit_length())
    width = power * 3 // 4 if longest <= power * 3 // 4 else power
    return width if most is None else max(longest, min(width, most))


def fixed_batch(lm: LanguageModel, tokens: Sequence[Tokens], examples: int, width: int) -> Fixed:
    """Pad a batch to `examples` examples of `width` tokens, on the CPU.

    Further examples repeat the first, which has real tokens to attend to; further scored tokens have weight 0.
    """
    full = [*tokens, *[tokens[0]] * (examples - len(tokens))]
    batch = collate(full, pad_id=lm.pad_id, decoder_start_id=lm.decoder_start_id)
    count = sum(len(t.scored) for t in tokens)

    def wide(x: Tensor, value: int = 0) -> Tensor:
        return pad(x, (0, width - x.shape[1]), value=value)

    def long(x: Tensor) -> Tensor:
        return pad(x[:count], (0, examples * width - count))

    shift = width - (batch.ids if batch.decoder_ids is None else batch.decoder_ids).shape[1]
    fixed = TokenBatch(
        ids=wide(batch.ids, lm.pad_id),
        attention_mask=wide(batch.attention_mask),
        rows=long(batch.rows + batch.example * shift),
        targets=long(batch.targets),
        example=long(batch.example),
        counts=batch.counts,
        decoder_ids=None if batch.decoder_ids is None else wide(batch.decoder_ids, lm.pad_id),
    )
    return Fixed(fixed, long(torch.full((count,), 1 / count)))


# ---------------------------------------------------------------- what a capture must not change


def random_state() -> dict[str, Any]:
    """Return the state of all random number generators that a training draws from."""
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": on_gpu}


def set_random_state(state: dict[str, Any]) -> None:
    """Set the random number generators to a state of `random_state`."""
    torch.set_rng_state(state["cpu"].cpu())
    for number, each in enumerate(state["cuda"]):
        torch.cuda.set_rng_state(each.cpu(), number)


class _State:
    """Weights, optimizer and random state, to be restored in place: graphs read and write them where they are."""

    def __init__(self, step: PlainStep) -> None:
        self.step, self.noise = step, random_state()
        self.weights = {name: x.clone() for name, x in step.lm.module.state_dict().items()}
        state = step.optimizer.state
        self.optimizer = {p: {name: x.clone() for name, x in own.items()} for p, own in state.items()}

    def restore(self) -> None:
        self.step.lm.module.load_state_dict(self.weights)
        for p, own in self.step.optimizer.state.items():
            for name, x in own.items():
                before = self.optimizer.get(p, {}).get(name)
                x.zero_() if before is None else x.copy_(before)  # AdamW begins with zeros
        set_random_state(self.noise)
