"""The sides of the benchmark of the step, each in a process of its own: pyunlearn, the plain recipe, and the floor."""

from __future__ import annotations

import gc
import itertools
import os
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

import pyunlearn
from benchmarks.memory import resident
from benchmarks.step_cases import BETA, LEARNING_RATE, MAX_GRAD_NORM, METHODS, SEED, Method, Task
from benchmarks.step_phases import Clock, Gate, Memory, Phases
from benchmarks.step_plain import Stepwise, plain_trainer
from pyunlearn import models
from pyunlearn.data import Tokens, read_examples
from pyunlearn.methods import METHODS as FORGET_TERMS
from pyunlearn.models.adapters import with_lora
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.models.scoring import Scorer
from pyunlearn.unlearning.distributed import Processes, make_accelerator
from pyunlearn.unlearning.loop import StepParts, optimizer_step
from pyunlearn.unlearning.objectives import ForgetTerm, RetainTerm
from pyunlearn.unlearning.optimizer import TrainedWeights
from pyunlearn.unlearning.reference import Reference, cached_states
from pyunlearn.unlearning.schedule import Schedule


def child(connection: Any, task: Task) -> None:
    """Run one side: take a step for each message of the parent, or a whole run."""
    torch.set_num_threads(task.threads)
    if task.precision == "autocast":
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    before = 0 if task.device == "cuda" else resident("VmRSS")
    if task.side == "floor":
        _floor(connection, task)
    elif task.steps is not None:
        run = _run_of_pyunlearn if task.side == "pyunlearn" else _run_of_plain
        connection.send(run(task) | {"before": before})
    else:
        (_steps_of_pyunlearn if task.side == "pyunlearn" else _steps_of_plain)(connection, task, before)


def _loaded(task: Task) -> tuple[LanguageModel, dict[str, list[Tokens]], Schedule]:
    """Return the model on its device, the tokens by role, and the order of the retain texts."""
    bfloat16 = task.precision == "bfloat16" and task.side != "plain"
    model, tokenizer = models.load(task.folder, dtype=torch.bfloat16 if bfloat16 else torch.float32)
    tokenizer.chat_template = None
    lm = LanguageModel.of(model.to(task.device).eval(), tokenizer)
    tokens = lm.encode({role: read_examples(rows, role=role) for role, rows in task.rows.items()})
    retain = len(tokens["retain"])
    schedule = Schedule(batch_size=task.batch_size, micro_batch_size=None, retain_examples=retain, seed=SEED)
    return lm, tokens, schedule


def _forget_indices(task: Task, tokens: dict[str, list[Tokens]], step: int) -> np.ndarray:
    """Return the forget texts of a step: in their order, again from the start."""
    return np.arange(step * task.batch_size, (step + 1) * task.batch_size) % len(tokens["forget"])


def _steps_of_pyunlearn(connection: Any, task: Task, before: int) -> None:
    """Take the optimizer steps of pyunlearn's loop."""
    method = METHODS[task.method]
    lm, tokens, schedule = _loaded(task)
    connection.send({"before": before})
    parts = _step_parts(task, method, lm, tokens, schedule)
    clock = Clock(task.device, task.threads)
    phases = Phases(clock)
    phases.watch_model(parts.weights.model, lm.inner.get_output_embeddings())
    phases.watch_update(parts.accelerator, parts.weights.optimizer)
    gate = Gate(connection, clock, phases, lambda: dict(parts.weights.parameters))
    for step in itertools.count():
        if not gate.opens():
            return
        record = optimizer_step(parts, _forget_indices(task, tokens, step), step, max_grad_norm=MAX_GRAD_NORM)
        retain = record.get("retain_kl" if method.retain == "kl" else "retain_nll")
        gate.report(loss=(record["forget_loss"] or 0.0) + (retain or 0.0), gradient_norm=record["gradient_norm"])


def _step_parts(
    task: Task, method: Method, lm: LanguageModel, tokens: dict[str, list[Tokens]], schedule: Schedule
) -> StepParts:
    """Return what `pyunlearn.unlearn` makes for its loop, without the stops of single texts."""
    own = task.precision in ("default", "autocast")
    accelerator = make_accelerator(lm.inner) if own else Accelerator(mixed_precision="no")
    if method.lora:
        lm = with_lora(lm, method.lora, SEED)
    forget_term, reference = FORGET_TERMS[method.forget], Reference()
    scorer = Scorer(lm, 2 * task.batch_size, autocast=accelerator.autocast)
    if "reference" in forget_term.needs:
        reference.read_log_likelihoods(scorer, lm.likelihood, forget_term, tokens, None)
    if method.retain == "kl":
        every = range(len(tokens["retain"]))
        reference.retain = cached_states(scorer, lm.likelihood, tokens["retain"], every, scorer.batch_size)
    weights = TrainedWeights(lm.module, LEARNING_RATE["lora" if method.lora else "full"])
    return StepParts(
        accelerator,
        Processes(accelerator),
        schedule,
        ForgetTerm(
            lm, forget_term, {"beta": BETA} if method.forget == "npo" else {}, tokens, reference=reference,
            visits=np.zeros(len(tokens["forget"]), dtype=np.int64), batch_reduction=method.batch_reduction,
        ),
        RetainTerm(lm, method.retain, float(method.retain is not None), tokens["retain"], reference=reference),
        weights,
        accelerator.prepare_optimizer(weights.optimizer),
    )  # fmt: skip


def _steps_of_plain(connection: Any, task: Task, before: int) -> None:
    """Take the steps of the plain trainer."""
    method = METHODS[task.method]
    lm, tokens, schedule = _loaded(task)
    connection.send({"before": before})
    texts = _in_order(task, tokens, schedule)
    clock, steps = Clock(task.device, task.threads), Stepwise()
    phases = Phases(clock)
    phases.watch_model(lm.inner, lm.inner.get_output_embeddings())
    with tempfile.TemporaryDirectory() as out:
        trainer = _trainer(task, lm, texts, phases, out, [steps])
        trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
        steps.trainer, steps.gate = trainer, Gate(connection, clock, phases, lambda: trained)
        trainer.train()
    assert trainer.method is method


def _in_order(task: Task, tokens: dict[str, list[Tokens]], schedule: Schedule) -> dict[str, list[Tokens]]:
    """Return forget and retain texts in the order in which the steps of pyunlearn take them, for 100 steps."""
    forget = [tokens["forget"][i] for step in range(100) for i in _forget_indices(task, tokens, step)]
    return {
        "forget": forget,
        "retain": [tokens["retain"][i] for step in range(100) for i in schedule.retain_indices(step)],
    }


def _trainer(
    task: Task, lm: LanguageModel, texts: dict[str, list[Tokens]], phases: Phases, out: str, callbacks: Any = ()
) -> Any:
    return plain_trainer(
        lm.module, METHODS[task.method], texts, phases, out=out, batch_size=task.batch_size, device=task.device,
        autocast=task.precision != "float32", steps=task.steps or 10**6, callbacks=callbacks,
    )  # fmt: skip


def _run_of_pyunlearn(task: Task) -> dict[str, Any]:
    """Call `pyunlearn.unlearn`; return its seconds, those outside optimizer steps, and its steps."""
    method = METHODS[task.method]
    lm, _, _ = _loaded(task)
    lm.tokenizer.chat_template = None
    clock, memory = Clock(task.device, task.threads), Memory(task.device == "cuda")
    seconds: list[float] = []
    began = clock()
    with _timed_steps(clock, seconds):
        result = pyunlearn.unlearn(
            lm.module,
            task.rows["forget"],
            retain=task.rows["retain"],
            holdout=task.rows["holdout"],
            tokenizer=lm.tokenizer,
            method=method.forget,
            method_options={"beta": BETA} if method.forget == "npo" else {},
            batch_reduction=method.batch_reduction,
            retain_loss=method.retain,
            lora=method.lora,
            learning_rate=LEARNING_RATE["lora" if method.lora else "full"],
            batch_size=task.batch_size,
            max_steps=task.steps,
            utility_budget=1.0,
            template="none",
            seed=SEED,
            progress=False,
        )
    total, steps = clock() - began, sum(seconds)
    return {"seconds": total, "outside": total - steps, "steps": len(result.history), "peak": memory.peak()}


class _timed_steps:
    """Context in which the seconds of each optimizer step of a run are added to a list."""

    def __init__(self, clock: Clock, seconds: list[float]) -> None:
        self.clock, self.seconds = clock, seconds

    def __enter__(self) -> None:
        from pyunlearn.unlearning import loop

        self.loop, self.step = loop, loop.optimizer_step

        def timed(*arguments: Any, **options: Any) -> Any:
            began = self.clock()
            record = self.step(*arguments, **options)
            self.seconds.append(self.clock() - began)
            return record

        loop.optimizer_step = timed

    def __exit__(self, *_: Any) -> None:
        self.loop.optimizer_step = self.step


def _run_of_plain(task: Task) -> dict[str, Any]:
    """Train with the plain trainer for as many steps; the copy of the reference model is a part of the run."""
    lm, tokens, schedule = _loaded(task)
    texts = _in_order(task, tokens, schedule)
    clock, memory = Clock(task.device, task.threads), Memory(task.device == "cuda")
    with tempfile.TemporaryDirectory() as out:
        began = clock()
        _trainer(task, lm, texts, Phases(clock), out).train()
        return {"seconds": clock() - began, "steps": task.steps, "peak": memory.peak()}


def _floor(connection: Any, task: Task) -> None:
    """Take, for each message, the matrix products of a step: trunk on padded positions, head on scored ones."""
    method = METHODS[task.method]
    lm, tokens, schedule = _loaded(task)
    dtype = torch.float32 if task.precision == "float32" else torch.bfloat16
    head = lm.inner.get_output_embeddings()
    layers = [m.weight.detach().to(dtype) for m in lm.inner.modules() if isinstance(m, nn.Linear) and m is not head]
    vocabulary = head.weight.detach().to(dtype)
    del lm, head
    gc.collect()
    clock = Clock(task.device, task.threads)
    connection.send({})
    products = 2 if method.lora else 3
    buffers: dict[Any, Tensor] = {}
    for step in itertools.count():
        if connection.recv() is None:
            return
        batches = [[tokens["forget"][i] for i in _forget_indices(task, tokens, step)]]
        if method.retain is not None:
            batches.append([tokens["retain"][i] for i in schedule.retain_indices(step)])
        calls: list[Callable[[], Any]] = []
        for role, batch in enumerate(batches):
            rows = len(batch) * max(len(t.ids) for t in batch)
            scored = sum(len(t.scored) for t in batch)
            for weight in layers:
                calls += _products(rows, weight, products, buffers)
            # the head's weights are the embedding's: trained, unless an adapter is; kl has the reference's too
            calls += _products(scored, vocabulary, products, buffers)
            calls += _products(scored, vocabulary, 1, buffers) if role and method.retain == "kl" else []
        began = clock()
        for call in calls:
            call()
        connection.send({"seconds": clock() - began})


def _products(rows: int, weight: Tensor, count: int, buffers: dict[Any, Tensor]) -> list[Callable[[], Any]]:
    """Return the products of a linear layer: forward, gradient of the input, gradient of the weight."""
    outputs, inputs = weight.shape

    def buffer(*key: Any) -> Tensor:
        if key not in buffers:
            buffers[key] = torch.randn(*key[1:], device=weight.device).to(weight.dtype)
        return buffers[key]

    x, y = buffer("x", rows, inputs), buffer("y", rows, outputs)
    out, d_x, d_w = buffer("out", rows, outputs), buffer("d_x", rows, inputs), buffer("d_w", outputs, inputs)
    calls = [
        lambda: torch.mm(x, weight.T, out=out),
        lambda: torch.mm(y, weight, out=d_x),
        lambda: torch.mm(y.T, x, out=d_w),
    ]
    return calls[:count]
