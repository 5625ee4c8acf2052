"""The loop: ascend on what is memorized, one example at a time let go as it reaches the level of unseen text, never past it."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from pyunlearn import models
from pyunlearn.data import read_examples
from pyunlearn.edits.masks import Mask, digest_of, mask_of, require_mask
from pyunlearn.errors import ArgumentError, DataError
from pyunlearn.methods import REFUSALS, resolve
from pyunlearn.metrics import NULL_MEAN, SIGNIFICANT
from pyunlearn.models.loading import encoded
from pyunlearn.models.sampling import preferred, refused
from pyunlearn.options import accepts
from pyunlearn.output import check_output, shown, versions
from pyunlearn.unlearning.config import UnlearnConfig
from pyunlearn.unlearning.interrupt import Interruptible
from pyunlearn.unlearning.objectives import finite, forget_step, retain_step
from pyunlearn.unlearning.optimizer import State
from pyunlearn.unlearning.result import Result
from pyunlearn.unlearning.setup import Run
from pyunlearn.unlearning.token_weights import Emphasis

_ROUND = 16  # optimizer steps between two evaluations, at most
_FIXED = (
    "method",
    "method_options",
    "retain_loss",
    "retain_weight",
    "learning_rate",
    "batch_size",
    "until",
    "utility_budget",
    "max_grad_norm",
    "mask",
    "l1",
    "order",
    "token_share",
    "seed",
)
_HALVINGS = 6  # of the learning rate, before a run gives up


def _unlearn(
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
    micro_batch_size: int | None = None,
    order: str = "random",
    difficulty: Any = "nll",
    token_weights: Any = None,
    token_share: float = 1.0,
    max_steps: int = 200,
    until: float = NULL_MEAN,
    utility_budget: float = 0.05,
    max_grad_norm: float = 1.0,
    mask: Any = None,
    l1: float = 0.0,
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
            a path to .jsonl, .json, .csv, .tsv, .txt, .parquet. With prompts, only the completion is scored and forgotten. `winner` beside them is what
            `dpo` prefers.
        retain: text that must keep working, same forms: trained on beside the ascent (`retain_loss`) and watched.
        holdout: text of the forget set's kind that was never trained on, same forms; 19 texts or more. Default: sampled from the model.
        tokenizer: needed when `model` is a model object whose name leads to none.
        method: "ga", "npo", "simnpo", ... (`pyunlearn methods` lists them), or with a retain loss "graddiff", "npo+nll", "simnpo+nll", ...
        method_options: the method's own options, such as {"beta": 0.1}.
        retain_loss: "nll" trains on the retain set, "kl" keeps the reference's whole distribution at each of its tokens, "hold" only undoes what
            the run has cost it (each example's rise above its first negative log-likelihood), "representation", of rmu
            and adaptive_rmu, keeps its hidden states in the steered layer; None does nothing; "auto": the method's own where it has one, or else nll,
            where there is a retain set.
        retain_weight: factor on the retain loss.
        reference_model: what NPO, UNDIAL, KL and their like compare with; default: the model as it came, read once.
        learning_rate: of AdamW; default 5e-6, for adapters (PEFT) 1e-4, and ten times that for idk, rmu and adaptive_rmu.
        batch_size: examples in one optimizer step.
        micro_batch_size: of these, so many go through the model together; their gradients are added up, so the numbers are those of the whole batch up to
            rounding, in less memory. Default: all.
        order: "random", or "easy_first" or "hard_first" by their difficulty.
        difficulty: "nll": mean negative log-likelihood under the reference model (give one that never saw the texts: under the model as it came what
            is memorized looks easy); "ksd": how much the retain set supports an example (`pyunlearn.metrics.ksd_difficulty`); or a number for each forget
            example, high = hard, from any measure.
        token_weights: factors on the log-likelihoods of a forget text's tokens. "importance": how much the rest of the text hangs on a token, by masking
            each in turn (as many forward passes as tokens); "reference": how much likelier it is than under reference_model; both once before
            the first step, with mean 1 in each text; or a list of numbers for each forget example, which stay as they are.
        token_share: keep only this share of each text's tokens, those of the largest weight; the others get 0.
        max_steps: optimizer steps at most.
        until: bits of anchored exposure at which an example is let go; 1.443 is the mean of unseen text.
        utility_budget: allowed relative rise of the utility text's negative log-likelihood, 0.05 = 5 % (of 1 nat at least).
        max_grad_norm: gradients are clipped to this norm.
        mask: which weights may change, whatever the method; all others keep their bits. A dict of parameter names to boolean tensors (what is not in it
            may change), such as `edits.saliency_mask` and `edits.prune` give, or "saliency" (that mask of this forget set, half of the weights)
            or "nonzero" (weights that are 0, pruned ones, stay 0).
        l1: strength of a penalty on the sum of the absolute weights that train, falling in a line to 0 at max_steps: beside each step of the optimizer a weight
            goes towards 0 by learning_rate * l1 * (1 - step / max_steps) (arXiv 2304.04934). For adapters and small models.
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
    settings = {k: shown(v) for k, v in locals().items()}
    whole = (
        ("batch_size", batch_size, 1),
        ("micro_batch_size", batch_size if micro_batch_size is None else micro_batch_size, 1),
        ("max_steps", max_steps, 0),
    )
    for name, value, least in whole:
        if not isinstance(value, int) or value < least:
            raise ArgumentError(f"{name} must be a whole number, {least} or more, got {value!r}")
    amounts = {
        "utility_budget": utility_budget,
        "until": until,
        "retain_weight": retain_weight,
        "max_grad_norm": max_grad_norm,
        "l1": l1,
    }
    for name, amount in amounts.items():
        if not isinstance(amount, (int, float)) or not amount >= 0:
            raise ArgumentError(f"{name} must be a number, 0 or more, got {amount!r}")
    if learning_rate is not None and not 0 < learning_rate < 1:
        raise ArgumentError(f"learning_rate must lie between 0 and 1, got {learning_rate!r}")
    if until >= SIGNIFICANT:
        raise ArgumentError(
            f"until must be below {SIGNIFICANT:.2f} bits, where an example counts as memorized, got {until!r}"
        )
    chosen, retain_loss = resolve(
        method, retain_loss, retain is not None, method_options or {}, reference_model is not None
    )
    require_mask(mask)
    emphasis = Emphasis(token_weights, token_share, order, difficulty)
    emphasis.check(chosen, has_reference=reference_model is not None, has_retain=retain is not None)
    if output_dir is not None:
        check_output(output_dir)
    checkpoint = None if output_dir is None else _beside(Path(output_dir).resolve())
    if resume and (checkpoint is None or not checkpoint.exists()):
        where = "no output_dir was given" if checkpoint is None else f"{checkpoint} does not exist"
        raise ArgumentError(
            f"resume goes on from the checkpoint of an interrupted run, and {where}: give that run's output_dir, or start anew"
        )
    if checkpoint is not None and checkpoint.exists() and not resume:
        raise ArgumentError(
            f"{checkpoint} holds an interrupted run: go on from it with resume=True (--resume), or delete it to start anew"
        )
    forget_examples = read_examples(forget, role="forget")
    roles = {
        role: read_examples(source, role=role)
        for role, source in (("retain", retain), ("holdout", holdout))
        if source is not None
    }

    if "refusals" in chosen.needs:
        own = (method_options or {}).get("refusals")
        texts = REFUSALS if own is None else own
        roles["refusals"] = refused(forget_examples, texts, seed, alone="forget" not in chosen.reads)
    if "winners" in chosen.needs:
        roles["winners"] = preferred(forget_examples, (method_options or {}).get("winners"))

    if isinstance(model, (str, Path)):
        model, tokenizer = models.load(model, tokenizer=tokenizer)
    models.require_language_model(model)
    tokenizer = models.tokenizer_of(model, tokenizer)
    tokens = encoded(model, tokenizer, {"forget": forget_examples, **roles}, truncate)
    run = Run(
        model, tokenizer, chosen, method_options or {}, tokens["forget"], tokens.get("retain"), tokens.get("holdout"),
        instead=tokens.get("refusals") or tokens.get("winners"), reference_model=reference_model, retain_loss=retain_loss, emphasis=emphasis,
        cached=State.progress(checkpoint).get("cached") if resume and checkpoint else None, batch_size=batch_size,
        micro_batch_size=micro_batch_size, max_steps=max_steps, until=until, budget=utility_budget, workspace=workspace, seed=seed, progress=progress,
    )  # fmt: skip
    learning_rate = learning_rate or (1e-4 if run.adapted else 5e-6) * chosen.rate
    settings["learning_rate"] = learning_rate
    settings["mask"] = digest_of(mask)
    run.take_fingerprint({name: settings[name] for name in _FIXED} | ({"max_steps": max_steps} if l1 else {}))
    with Interruptible() as interrupt, run.steering.alone() if run.steering else nullcontext():
        movable = mask_of(mask, run.model, tokens["forget"], batch_size=batch_size, workspace=workspace)
        history, stopped = _ascend(
            run,
            run.workers.same_masks(movable),
            learning_rate,
            max_steps,
            retain_weight if retain_loss else 0.0,
            max_grad_norm,
            l1,
            checkpoint,
            resume,
            interrupt,
        )
    texts = [e.prompt + e.completion for e in forget_examples]
    result = Result(
        run.inner,
        tokenizer,
        run.verdicts(texts),
        run.utility(),
        stopped,
        run.reference_scores.tolist(),
        history,
        versions() | {'target_exposure' if k == 'until' else k: v for k, v in settings.items()},
    )
    if output_dir is not None and stopped != "interrupted":
        if run.workers.leads:
            result.save(output_dir)
            if checkpoint is not None:
                checkpoint.unlink(missing_ok=True)
        run.workers.wait()
    return result


def _ascend(
    run: Run,
    mask: Mask,
    learning_rate: float,
    max_steps: int,
    retain_weight: float,
    max_grad_norm: float,
    l1: float,
    checkpoint: Path | None,
    resume: bool,
    interrupt: Interruptible,
) -> tuple[list[dict[str, Any]], str]:
    """The loop. Leaves the best state within the budget in the model; returns one record a step, and why it ended."""
    state = State(run.model, learning_rate, resumable=checkpoint is not None, mask=mask)
    optimizer = run.accelerator.prepare_optimizer(state.optimizer)
    history: list[dict[str, Any]] = []
    step = round_number = halvings = 0
    if resume and checkpoint is not None:
        stored = state.read(checkpoint)
        saved = stored["progress"]
        _require_same(checkpoint, saved["fingerprint"], run.fingerprint)
        state.take(stored)
        step, round_number, halvings = saved["step"], saved["round"], saved["halvings"]
        history = json.loads(saved["history"])
        run.return_to((saved["steps"], saved["multiplier"]))
        run.now = run.measure()
        state.set_learning_rate(learning_rate / 2**halvings)
    objection, began = "", run.position()
    last_saved = time.monotonic()

    def save() -> None:
        if checkpoint is not None and run.workers.leads:
            numbers = {"step": step, "round": round_number, "halvings": halvings, "fingerprint": run.fingerprint}
            steps, multiplier = run.position()
            numbers |= {
                "history": json.dumps(history),
                "steps": steps.tolist(),
                "multiplier": multiplier,
                "cached": run.cached,
            }
            state.save(checkpoint, numbers)

    try:
        while step < max_steps and halvings <= _HALVINGS:
            order = run.in_order(round_number)
            if not order.size:
                break
            taken = [order[i : i + run.batch_size] for i in range(0, len(order), run.batch_size)][
                : min(_ROUND, max_steps - step)
            ]
            records: list[dict[str, Any]] = []
            began = run.position()
            for chosen in taken:
                # ---------------------------------------------------------------- one optimizer step
                started = time.perf_counter()
                optimizer.zero_grad()
                forget_loss = forget_step(run, chosen)  # before the retain term: only one graph is alive
                retained = retain_step(run, step + len(records), retain_weight)
                run.workers.sum_gradients(state.parameters.values())
                state.mask_gradients()
                norm = run.accelerator.clip_grad_norm_(state.parameters.values(), max_grad_norm)
                optimizer.step()
                state.shrink(l1 * (1 - (step + len(records)) / max_steps))
                state.hold()
                # ----------------------------------------------------------------
                run.steps[chosen] += 1
                interrupt.check()
                records.append({
                    "step": step + len(records) + 1, "round": round_number, "examples": [int(i) for i in chosen],
                    "forget_loss": finite(forget_loss), **retained, "gradient_norm": finite(float(norm)),
                    "learning_rate": learning_rate / 2**halvings, "seconds": time.perf_counter() - started,
                })  # fmt: skip
            found = run.measure()
            objection = run.objection(found) or ""
            if objection:
                state.go_back()
                halvings += 1
                state.set_learning_rate(learning_rate / 2**halvings)
                run.return_to(began)
            else:
                state.keep()
                run.now = found
            step, round_number = step + len(records), round_number + 1
            records[-1] |= {
                "kept": not objection, "objection": objection or None, "active": len(run.active()), "utility_rise": finite(found.utility),
                "mean_log_likelihood": [finite(x) for x in found.forget], "exposure": [finite(x) for x in found.lower],
            }  # fmt: skip
            history += records
            run.bar.update(step, int(run.memorized.sum()), len(run.active()), run.now.utility, run.budget, halvings)
            if time.monotonic() - last_saved > 300:
                save()
                last_saved = time.monotonic()
            began = run.position()
            interrupt.check()
    except KeyboardInterrupt:
        state.rewind()
        run.return_to(began)
        save()
        return history, "interrupted"
    finally:
        run.bar.close()
    if not run.memorized.any():
        return history, "nothing memorized"
    if not run.active().size:
        return history, "forgotten"
    return history, objection if halvings > _HALVINGS else "max_steps"


def _require_same(checkpoint: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises DataError unless a checkpoint was made with these texts, this model and these settings."""
    for name, value in now.items():
        if isinstance(value, list):
            same = len(saved[name]) == len(value) and np.allclose(saved[name], value, rtol=1e-4)
            what = f"another model or {name}"
        else:
            same, what = saved[name] == value, f"{name}={saved[name]!r}, not {value!r}"
        if not same:
            raise DataError(
                f"the checkpoint {checkpoint} was made with {what}: give the same, or delete it and start anew"
            )


def _beside(folder: Path) -> Path:
    """Where a run's checkpoint stands."""
    return folder.with_name(folder.name + ".checkpoint.pt")


@accepts(UnlearnConfig)
def unlearn(
    model: Any,
    forget: Any,
    *,
    retain: Any = None,
    holdout: Any = None,
    tokenizer: Any = None,
    reference_model: Any = None,
    config: Any = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool | None = None,
    **settings: Any,
) -> Result:
    """Remove the forget texts from a language model: model, forget, retain, holdout, tokenizer, reference_model, config,
    output_dir, resume, progress.

    Args:
        {options}
    """
    given = dict(vars(UnlearnConfig.of(config, settings, "unlearn")))
    given["until"] = given.pop("target_exposure")
    result = _unlearn(
        model,
        forget,
        retain=retain,
        holdout=holdout,
        tokenizer=tokenizer,
        reference_model=reference_model,
        output_dir=output_dir,
        resume=resume,
        progress=progress,
        **given,
    )
    return result
