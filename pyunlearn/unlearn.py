"""The loop: ascend on what is memorized, one example at a time let go as it reaches the level of unseen text, never past it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyunlearn import models
from pyunlearn._progress import Progress
from pyunlearn._state import State
from pyunlearn.data import Tokens, batches, collate, encode, padding_id, read_examples
from pyunlearn.errors import ArgumentError, ModelError, TrainingError
from pyunlearn.methods import Method, resolve
from pyunlearn.metrics import NULL_MEAN, SIGNIFICANT, generalized_exposure
from pyunlearn.references import sampled
from pyunlearn.result import ExampleResult, Result, Utility, check_output

Floats = NDArray[np.float64]
_WATCHED_TOKENS = 1024  # of the retain set or the references, at each evaluation
_ROUND = 16  # optimizer steps between two evaluations, at most
_HALVINGS = 6  # of the learning rate, before a run gives up


def unlearn(
    model: Any,
    forget: Any,
    *,
    retain: Any = None,
    holdout: Any = None,
    tokenizer: Any = None,
    method: str = "ga",
    method_options: dict[str, Any] | None = None,
    retain_loss: str | None = "auto",
    retain_weight: float = 1.0,
    reference_model: Any = None,
    learning_rate: float | None = None,
    batch_size: int = 8,
    max_steps: int = 200,
    until: float = NULL_MEAN,
    utility_budget: float = 0.05,
    max_grad_norm: float = 1.0,
    truncate: bool = False,
    workspace: int | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """Removes the forget texts from a language model.

    With nothing but `model` and `forget` it does the right thing: completions sampled from the model stand in for text that was never trained
    on. A forget example is *memorized* when it is likelier than 95 % of them; such examples are made less likely step by step, each until its
    anchored generalized exposure (see `pyunlearn.metrics.generalized_exposure`) has come down to that of unseen text. Every step must keep the
    utility text within its budget and no example may end below what unseen text gets; a step that breaks this is taken back and the learning rate halved.
    So what is returned is always the best state within the budget.

    Args:
        model: a transformers causal or encoder-decoder language model (PEFT-wrapped or not), or a path, a .gguf file or a name to load one from. It is
            changed in place. With adapters, only what requires a gradient is trained.
        forget: a text, a list of texts, a list of dicts (`text`; `prompt`/`completion`; `question`/`answer`; chat `messages`), a datasets.Dataset, or
            a path to .jsonl, .json, .csv, .tsv, .txt, .parquet. With prompts, only the completion is scored and forgotten.
        retain: text that must keep working, same forms: trained on beside the ascent (`retain_loss`) and watched.
        holdout: text of the forget set's kind that was never trained on, same forms; 19 texts or more. Default: sampled from the model.
        tokenizer: needed when `model` is a model object whose name leads to none.
        method: "ga", "npo", "simnpo", or with a retain loss "graddiff", "npo+nll", "simnpo+nll".
        method_options: the method's own numbers, such as {"beta": 0.1}.
        retain_loss: "nll", None, or "auto": nll where there is a retain set.
        retain_weight: factor on the retain loss.
        reference_model: whose log-likelihoods NPO compares with; default: the model as it came, scored once.
        learning_rate: of AdamW; default 5e-6, for adapters (PEFT) 1e-4.
        batch_size: examples in one optimizer step.
        max_steps: optimizer steps at most.
        until: bits of anchored exposure at which an example is let go; 1.443 is the mean of unseen text.
        utility_budget: allowed relative rise of the utility text's negative log-likelihood, 0.05 = 5 % (of 1 nat at least).
        max_grad_norm: gradients are clipped to this norm.
        truncate: cut examples that are longer than the model's context, instead of refusing them.
        workspace: bytes for kept logits, see `pyunlearn.ops.linear_log_likelihood`.
        output_dir: where the result is saved at the end (new or empty). A checkpoint stands beside it while the run goes on.
        resume: go on from that checkpoint; the numbers are those of an uninterrupted run.
        seed: of sampling and order; the same seed gives the same run, bit for bit on one CPU.
        progress: a progress bar on standard error; default: if that is a terminal.

    Returns:
        Result: `.model`, `.examples` (one verdict each), `.utility`, `.history` (one record a step), `.stopped`, `.save(dir)`.

    Raises:
        ArgumentError, DataError, ModelError, OutputError: something given cannot be used; nothing has been changed then.
        TrainingError: the model's own log-likelihoods are not finite before the first step.

    Source: Baluta et al. 2024 (arXiv 2411.04388) for the ascent and what it is held against; the stop is ours.
    """
    settings = {k: v if isinstance(v, (str, int, float, bool, dict, type(None))) else type(v).__name__ for k, v in locals().items()}
    for name, value, least in (("batch_size", batch_size, 1), ("max_steps", max_steps, 0), ("utility_budget", utility_budget, 0.0)):
        if not isinstance(value, (int, float)) or not value >= least:
            raise ArgumentError(f"{name} must be {least} or more, got {value!r}")
    if learning_rate is not None and not 0 < learning_rate < 1:
        raise ArgumentError(f"learning_rate must lie between 0 and 1, got {learning_rate!r}")
    chosen, retain_loss = resolve(method, retain_loss, retain is not None, method_options or {})
    if output_dir is not None:
        check_output(output_dir)
    elif resume:
        raise ArgumentError("resume=True needs the output_dir of the interrupted run")
    forget_examples = read_examples(forget, role="forget")
    roles = {role: read_examples(source, role=role) for role, source in (("retain", retain), ("holdout", holdout)) if source is not None}

    if isinstance(model, (str, Path)):
        model, tokenizer = models.load(model, tokenizer=tokenizer)
    models.require_language_model(model)
    tokenizer = _tokenizer(model, tokenizer)
    both = models.is_encoder_decoder(model)
    length = models.context_length(model)
    tokens = {
        role: encode(examples, tokenizer, role=role, max_length=length, encoder_decoder=both, truncate=truncate)
        for role, examples in {"forget": forget_examples, **roles}.items()
    }
    run = _Run(model, tokenizer, chosen, method_options or {}, tokens["forget"], tokens.get("retain"), tokens.get("holdout"), seed,
               batch_size, workspace, until, utility_budget, reference_model, progress)  # fmt: skip
    learning_rate = learning_rate or (1e-4 if run.adapted else 5e-6)
    settings["learning_rate"] = learning_rate
    checkpoint = None if output_dir is None else Path(output_dir).with_name(Path(output_dir).name + ".checkpoint.pt")
    history, stopped = _ascend(
        run, learning_rate, max_steps, retain_weight if retain_loss else 0.0, max_grad_norm, checkpoint, resume
    )
    texts = [e.prompt + e.completion for e in forget_examples]
    result = Result(run.inner, tokenizer, run.verdicts(texts), run.utility(), stopped, history, _plain(settings))
    if output_dir is not None and stopped != "interrupted":
        result.save(output_dir)
        if checkpoint is not None:
            checkpoint.unlink(missing_ok=True)
    return result


@dataclass(frozen=True)
class Measured:
    """The whole state of forgetting and utility at one moment."""

    forget: Floats  # (B,) mean log-likelihood a token, nats
    lower: Floats  # (B,) anchored exposure, bits
    upper: Floats
    watched: Floats  # (W,) mean negative log-likelihood a token of each watched sequence
    drift: float  # nats a token
    utility: float  # relative rise


class _Run:
    """What stays the same during a run: the texts, the yardsticks under the original model, and how to measure against them."""

    def __init__(
        self, model: Any, tokenizer: Any, method: Method, options: dict[str, Any], forget: list[Tokens], retain: list[Tokens] | None,
        holdout: list[Tokens] | None, seed: int, batch_size: int, workspace: int | None, until: float, budget: float,
        reference_model: Any, progress: bool | None,
    ) -> None:  # fmt: skip
        from accelerate import Accelerator

        self.accelerator = _accelerator(Accelerator, model)
        self.model = self.accelerator.prepare_model(model)
        self.model.eval()  # no dropout: the same weights always give the same log-likelihoods
        self.inner = self.accelerator.unwrap_model(self.model)
        self.adapted = hasattr(self.inner, "peft_config")
        self.likelihood = models.Likelihood(self.model, workspace=workspace)
        self.tokenizer, self.method, self.options = tokenizer, method, options
        self.forget, self.retain, self.seed, self.batch_size = forget, retain, seed, batch_size
        self.until, self.budget = until, budget
        self.pad, self.start = padding_id(tokenizer), models.decoder_start_id(model) if models.is_encoder_decoder(model) else None
        self.bar = Progress(progress)

        self.bar.say("scoring the forget set")
        self.original = self.mean_log_likelihood(forget)
        if not np.isfinite(self.original).all():
            raise TrainingError("the model gives NaN or Inf for the forget set before the first step: it cannot be trained from here")
        self.greedy_before = self.greedy_match()
        self.bar.say("sampling text the model would typically write" if holdout is None else "scoring the holdout")
        self.references = sampled(self.inner, tokenizer, forget, seed=seed) if holdout is None else holdout
        self.reference_scores = -self.mean_log_likelihood(self.references)
        self.watch_references = _within(self.references, _WATCHED_TOKENS)
        self.watch = self.watch_references if retain is None else _within(retain, _WATCHED_TOKENS)
        self.watched_on = "retain set" if retain is not None else "holdout" if holdout is not None else "text sampled from the model"
        self.watched_before = -self.mean_log_likelihood(self.watch)
        self.drift_before = float(-self.mean_log_likelihood(self.watch_references).mean())
        self.significant = min(SIGNIFICANT, math.log2(len(self.references) + 1) - 1e-9)
        self.reference_sums = self.original * [len(t.scored) for t in forget]
        if reference_model is not None:
            self.reference_sums = self._sums_under(reference_model)
        self.start_state = self.measure()
        self.memorized = self.start_state.lower >= self.significant
        self.now = self.start_state
        self.steps = np.zeros(len(forget), dtype=np.int64)

    # -- measuring

    def batches(self, tokens: Sequence[Tokens], size: int | None = None) -> Iterator[tuple[list[int], Any]]:
        """Length-bucketed batches on the model's device, with their places in `tokens`."""
        for places, batch in batches(tokens, size or 2 * self.batch_size, pad_id=self.pad, decoder_start_id=self.start):
            yield places, batch.to(self.accelerator.device)

    @torch.no_grad()
    def mean_log_likelihood(self, tokens: Sequence[Tokens], likelihood: models.Likelihood | None = None) -> Floats:
        """(len(tokens),) mean log-likelihood per scored token, nats."""
        out = np.zeros(len(tokens))
        for places, batch in self.batches(tokens):
            with self.accelerator.autocast():
                found = (likelihood or self.likelihood)(batch)
            out[places] = (_sums(found, batch.counts) / batch.counts).double().cpu().numpy()
        return out

    @torch.no_grad()
    def greedy_match(self) -> Floats:
        """(B,) share of each forget example's tokens that are the model's first choice."""
        out = np.zeros(len(self.forget))
        for places, batch in self.batches(self.forget):
            with self.accelerator.autocast():
                found = self.likelihood.greedy_matches(batch)
            out[places] = (_sums(found.float(), batch.counts) / batch.counts).double().cpu().numpy()
        return out

    def measure(self) -> Measured:
        """Scores everything that is watched, under the present weights."""
        forget, watched = self.mean_log_likelihood(self.forget), -self.mean_log_likelihood(self.watch)
        same = self.watch_references is self.watch
        drift = float((watched if same else -self.mean_log_likelihood(self.watch_references)).mean()) - self.drift_before
        if not (np.isfinite(forget).all() and np.isfinite(watched).all()):
            bad = np.full(len(forget), np.nan)
            return Measured(forget, bad, bad, watched, math.nan, math.nan)
        exposure = generalized_exposure(-forget, self.reference_scores)
        rise = (watched.mean() - self.watched_before.mean()) / max(self.watched_before.mean(), 1.0)
        return Measured(forget, exposure.lower, exposure.upper, watched, drift, float(rise))

    def active(self) -> NDArray[np.int64]:
        """Indices of the examples that are still to be forgotten."""
        return np.flatnonzero(self.memorized & (self.now.lower > self.until))

    def objection(self, found: Measured) -> str | None:
        """Why a state may not be kept, or None."""
        if not math.isfinite(found.utility):
            return "not finite"
        if found.utility > self.budget:
            return "utility budget"
        over = (found.upper >= self.significant) & (self.start_state.upper < self.significant)
        return "over-unlearning" if over.any() else None

    def _sums_under(self, reference: Any) -> Floats:
        if isinstance(reference, (str, Path)):
            reference, _ = models.load(reference, tokenizer=self.tokenizer)
        if reference.get_input_embeddings().weight.shape[0] != self.inner.get_input_embeddings().weight.shape[0]:
            raise ModelError("reference_model has another vocabulary than the model: give one of the same family")
        home = reference.device
        reference = reference.to(self.accelerator.device).eval()
        means = self.mean_log_likelihood(self.forget, models.Likelihood(reference))
        reference.to(home)
        return means * [len(t.scored) for t in self.forget]

    # -- reporting

    def verdicts(self, texts: Sequence[str]) -> list[ExampleResult]:
        """One for each forget example."""
        greedy = self.greedy_match() if self.steps.any() else self.greedy_before
        return [
            ExampleResult(
                i, texts[i], len(t.scored), float(self.original[i]), float(self.now.forget[i]), float(self.start_state.lower[i]),
                float(self.now.lower[i]), float(self.now.upper[i]), float(self.greedy_before[i]), float(greedy[i]), int(self.steps[i]),
                self._verdict(i),
            )
            for i, t in enumerate(self.forget)
        ]  # fmt: skip

    def _verdict(self, i: int) -> str:
        if self.now.upper[i] >= self.significant > self.start_state.upper[i]:
            return "over-unlearned"
        if not self.memorized[i]:
            return "not memorized"
        return "forgotten" if self.now.lower[i] <= self.until else "still exposed"

    def utility(self) -> Utility:
        """What the run has cost the watched text."""
        before, after = self.watched_before, self.now.watched
        rng = np.random.default_rng(self.seed)
        draws = rng.integers(0, len(before), (2000, len(before)))
        rises = (after[draws].mean(1) - before[draws].mean(1)) / np.maximum(before[draws].mean(1), 1.0)
        low, high = np.quantile(rises, [0.025, 0.975])
        return Utility(
            self.watched_on, len(before), float(before.mean()), float(after.mean()), self.now.utility, (float(low), float(high)),
            self.budget, self.now.drift,
        )  # fmt: skip


def _ascend(
    run: _Run, learning_rate: float, max_steps: int, retain_weight: float, max_grad_norm: float, checkpoint: Path | None, resume: bool
) -> tuple[list[dict[str, Any]], str]:
    """The loop. Leaves the best state within the budget in the model; returns one record a step, and why it ended."""
    state = State(run.model, learning_rate)
    optimizer = run.accelerator.prepare_optimizer(state.optimizer)
    history: list[dict[str, Any]] = []
    step = round_number = halvings = 0
    if resume and checkpoint is not None and checkpoint.exists():
        saved = state.load(checkpoint)
        step, round_number, halvings, history = saved["step"], saved["round"], saved["halvings"], json.loads(saved["history"])
        run.steps[:] = saved["steps"]
        run.now = run.measure()
        state.set_learning_rate(learning_rate / 2**halvings)
    objection = ""
    last_saved = time.monotonic()

    def save() -> None:
        if checkpoint is not None:
            done = {"step": step, "round": round_number, "halvings": halvings, "history": json.dumps(history), "steps": run.steps.tolist()}
            state.save(checkpoint, done)

    try:
        while step < max_steps and halvings <= _HALVINGS:
            todo = run.active()
            if not todo.size:
                break
            order = np.random.default_rng((run.seed, round_number)).permutation(todo)
            taken = [order[i : i + run.batch_size] for i in range(0, len(order), run.batch_size)][: min(_ROUND, max_steps - step)]
            records, began = [], run.steps.copy()
            for chosen in taken:
                # ---------------------------------------------------------------- one optimizer step
                started = time.perf_counter()
                optimizer.zero_grad()
                batch = collate([run.forget[i] for i in chosen], pad_id=run.pad, decoder_start_id=run.start).to(run.accelerator.device)
                with run.accelerator.autocast():
                    sums = _sums(run.likelihood(batch), batch.counts)
                reference = torch.as_tensor(run.reference_sums[chosen], dtype=sums.dtype, device=sums.device)
                forget_loss = run.method.loss(sums, batch.counts, reference, **run.options)
                run.accelerator.backward(forget_loss)  # before the retain term: only one graph is alive
                retain_nll = _retain_step(run, step + len(records), retain_weight)
                norm = run.accelerator.clip_grad_norm_(state.parameters.values(), max_grad_norm)
                optimizer.step()
                # ----------------------------------------------------------------
                run.steps[chosen] += 1
                records.append({
                    "step": step + len(records) + 1, "round": round_number, "examples": [int(i) for i in chosen],
                    "forget_loss": forget_loss.item(), "retain_nll": retain_nll, "gradient_norm": float(norm),
                    "learning_rate": learning_rate / 2**halvings, "seconds": time.perf_counter() - started,
                })  # fmt: skip
            found = run.measure()
            objection = run.objection(found) or ""
            if objection:
                state.go_back()
                halvings += 1
                state.set_learning_rate(learning_rate / 2**halvings)
                run.steps[:] = began
            else:
                state.keep()
                run.now = found
            step, round_number = step + len(records), round_number + 1
            records[-1] |= {
                "kept": not objection, "objection": objection or None, "active": len(run.active()), "utility_rise": _number(found.utility),
                "reference_drift": _number(found.drift), "mean_log_likelihood": [_number(x) for x in found.forget],
                "exposure": [_number(x) for x in found.lower],
            }  # fmt: skip
            history += records
            run.bar.update(step, int(run.memorized.sum()), len(run.active()), run.now.utility, run.budget, halvings)
            if time.monotonic() - last_saved > 300:
                save()
                last_saved = time.monotonic()
    except KeyboardInterrupt:
        state.go_back()
        save()
        return history, "interrupted"
    finally:
        run.bar.close()
    if not run.memorized.any():
        return history, "nothing memorized"
    if not run.active().size:
        return history, "forgotten"
    save()
    return history, objection if halvings > _HALVINGS else "max_steps"


def _retain_step(run: _Run, step: int, weight: float) -> float | None:
    """Adds the retain term's gradient to what the forget term left; returns the mean negative log-likelihood a token."""
    if not weight or not run.retain:
        return None
    n, size = len(run.retain), min(run.batch_size, len(run.retain))
    order = np.random.default_rng((run.seed, 1, step * size // n)).permutation(n)
    chosen = [order[(step * size + i) % n] for i in range(size)]
    batch = collate([run.retain[i] for i in chosen], pad_id=run.pad, decoder_start_id=run.start).to(run.accelerator.device)
    with run.accelerator.autocast():
        nll = -run.likelihood(batch).mean()
    run.accelerator.backward(weight * nll)
    return nll.item()


def _sums(values: Tensor, counts: Tensor) -> Tensor:
    """(B,) sums of values (n,), which stand example by example: no atomics, so the same bits every time."""
    return torch.stack([part.sum() for part in values.split(counts.tolist())])


def _within(tokens: list[Tokens], budget: int) -> list[Tokens]:
    """Evenly spaced sequences whose scored tokens fit the budget, one at least."""
    total = sum(len(t.scored) for t in tokens)
    count = max(1, min(len(tokens), len(tokens) * budget // max(total, 1)))
    return tokens if count == len(tokens) else [tokens[i * len(tokens) // count] for i in range(count)]


def _tokenizer(model: Any, tokenizer: Any) -> Any:
    """The tokenizer given, or the one that lies where the model came from."""
    if tokenizer is not None and not isinstance(tokenizer, (str, Path)):
        return tokenizer
    where = str(tokenizer or getattr(models.unwrapped(model), "name_or_path", "") or "")
    if where:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(where)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"no tokenizer could be loaded from {where}: pass tokenizer=, the one the model was trained with") from error
    raise ModelError("the model does not say where its tokenizer is: pass tokenizer=, the one the model was trained with")


def _accelerator(kind: Any, model: Any) -> Any:
    """An Accelerator; on a card that has bfloat16, float32 weights compute in it."""
    from accelerate.state import AcceleratorState

    if AcceleratorState._shared_state:
        return kind()
    wide = next(models.unwrapped(model).parameters()).dtype == torch.float32
    mixed = wide and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return kind(mixed_precision="bf16" if mixed else "no")


def _number(x: float) -> float | None:
    return float(x) if math.isfinite(x) else None


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    import pyunlearn

    forget = settings.get("forget")
    if isinstance(forget, str) and len(forget) > 200:
        settings["forget"] = forget[:200] + "..."
    return {"pyunlearn": pyunlearn.__version__, "torch": torch.__version__, **settings}
