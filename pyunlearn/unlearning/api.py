"""Public function `unlearn`: check every argument, set up the run, run the loop, return the result."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pyunlearn.attacks.judge import non_members_for
from pyunlearn.attacks.prepare import require_enough
from pyunlearn.data import Example, check_texts, read_roles
from pyunlearn.data.examples import source_name
from pyunlearn.data.redaction import masked
from pyunlearn.edits.masks import digest_of, mask_of, require_mask
from pyunlearn.errors import ArgumentError
from pyunlearn.methods import METHODS, Method, resolve
from pyunlearn.models.adapters import require_mergeable, with_lora
from pyunlearn.models.condition import require_trainable
from pyunlearn.models.four_bits import keep_differentiable
from pyunlearn.models.inspection import is_recomputing
from pyunlearn.models.language_model import LanguageModel, require_model, require_tokenizer
from pyunlearn.models.loading import without_weights
from pyunlearn.models.recomputation import recomputed_layers
from pyunlearn.models.scoring import Scorer, evaluation_mode
from pyunlearn.options import Flag, accepts, require, require_path
from pyunlearn.output import model_name
from pyunlearn.probes.forms import require_forms, with_forms
from pyunlearn.probes.renderings import RenderedTexts, likeliest, render
from pyunlearn.progress import Progress, logger
from pyunlearn.unlearning.attacked import try_attacks
from pyunlearn.unlearning.checkpoint import Checkpoint, sampled_texts
from pyunlearn.unlearning.config import UnlearnConfig
from pyunlearn.unlearning.distributed import Processes, fills_in_weights, is_main_process, make_accelerator, together
from pyunlearn.unlearning.interrupt import DeferredInterrupt
from pyunlearn.unlearning.loop import ascend
from pyunlearn.unlearning.measuring import after_merge, refresh, resume_scores
from pyunlearn.unlearning.optimizer import TrainedWeights
from pyunlearn.unlearning.outcome import notes_of, result_of
from pyunlearn.unlearning.preferences import substitutes_for
from pyunlearn.unlearning.result import Result, write_result
from pyunlearn.unlearning.robust import require_robust
from pyunlearn.unlearning.run_folder import RunFolder
from pyunlearn.unlearning.served_file import ServedFile
from pyunlearn.unlearning.setup import Session, setup
from pyunlearn.unlearning.sharded import processes_of, require_shareable
from pyunlearn.unlearning.token_weights import check_token_weights
from pyunlearn.unlearning.trackers import listening, require_listeners

_LEARNING_RATE, _ADAPTER_LEARNING_RATE = 5e-6, 1e-4


@accepts(UnlearnConfig)
def unlearn(
    model: Any,
    forget: Any,
    *,
    retain: Any = None,
    holdout: Any = None,
    tokenizer: Any = None,
    reference_model: Any = None,
    config: UnlearnConfig | str | Path | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool | None = None,
    on_step: Callable[[dict[str, Any]], Any] | None = None,
    **settings: Any,
) -> Result:
    """Remove the forget texts from a language model.

    Each forget example is compared with *non-members*: text that was never trained on, the holdout, or else texts that
    were written for this package, each score less that of a reference model if there is one. *Memorized* are those that
    stand out, at a false discovery rate over all of them.
    They are made less likely step by step, each until its anchored generalized exposure
    (`pyunlearn.metrics.generalized_exposure`) is that of non-members and no more of it is extracted; one that went too
    far is trained on until it is back. A round that may exceed the budget of the utility set or of the holdout (the
    upper end of the rise's interval decides) is rolled back. The learning rate doubles while rounds are cheap, and is
    halved where they are not. So the returned model is the last state within the budgets.

    Args:
        model: a transformers causal or encoder-decoder language model (PEFT-wrapped or not), or a path, a .gguf file or
            a name to load one from. It is changed in place, and left in the mode in which it came. Only parameters that
            require a gradient are trained.
        forget: a text, a list of texts, a list of dicts (`text`; `prompt`/`completion`; `question`/`answer`; chat
            `messages`), a datasets.Dataset, or a path to .jsonl, .json, .csv, .tsv, .txt, .parquet. Of a prompt
            with a completion, only the completion is scored and forgotten, of a chat all turns (`turns`), and of a dict
            with `forget`, a string or a list of strings, only these; the rest of it is held. With `dpo`, each example
            has a preferred answer `winner`.
        retain: text that must keep working, same forms: for the retain loss (`retain_loss`), and as the utility set,
            for which a fifth at most is set apart where there are 20 different texts or more. Copies of forget texts
            are left out, with a warning; of more than 100,000 texts, 100,000 are drawn.
        holdout: text of the forget set's kind that was never trained on, same forms, 19 different texts or more, no
            copy of a forget text among them; default: texts written for this package, or sampled from the model where
            these cannot serve (other languages): from the reference model, or else from the model, and then no
            text can be called forgotten.
        tokenizer: a tokenizer, or where to load it from; default: where the model was loaded from.
        reference_model: a model that never saw the forget texts, best the one before fine-tuning: each score is the
            model's less the reference model's of the same text, so that text that is easy for both is not mistaken for
            memorized. NPO, UNDIAL, KL and other methods compare with it; default for them: the original model.
        config: all settings in one object, or the path of a TOML file or a result.json; keywords replace single ones.
        output_dir: new or empty folder for the result; during the run, a checkpoint is next to it.
        resume: True continues from that checkpoint; the numbers are those of an uninterrupted run.
        progress: True shows a progress bar on standard error; default: only on a terminal.
        on_step: a function that is called with a copy of each step's record (as in `Result.history`) when its round has
            ended, for loggers and plots; of several processes, in the main process. What it raises ends the run, which
            can be resumed; after a kill the steps since the last checkpoint come again.
        {options}

    Returns:
        Result: `.model`, `.examples` (one verdict each; of texts longer than the context one for each window, with
        scope="person" one for each form, and for the whole in `.documents`), `.utility`, `.history` (one record per
        step), `.stopped`, `.notes` (on the texts), `.save(dir)`.

    Raises:
        ArgumentError, DataError, ModelError, OutputError: an argument cannot be used; the model is unchanged, or
            rounded to the formats of `gguf_like`.
        TrainingError: the model's log-likelihoods are not finite before the first step.

    Source: Baluta et al. 2024 (arXiv 2411.04388) for the ascent and the metric; the per-example stopping is ours.
    """
    config = UnlearnConfig.of(config, settings, "unlearn")
    _check_arguments(config, on_step, resume=resume, progress=progress, output_dir=output_dir, tokenizer=tokenizer)
    _require_models(model, reference_model, look_up=False)
    options = dict(config.method_options or {})
    has_retain, has_reference = retain is not None, reference_model is not None
    method, retain_loss = resolve(config.method, config.retain_loss, has_retain, options, has_reference)
    check_together(config, method, retain, reference_model)
    folder = RunFolder(output_dir, resume=resume)
    served = ServedFile(config.gguf_like, config.gguf_at_least, config.seed)
    sources = {"forget": forget, "retain": retain, "holdout": holdout}
    examples, drawn = read_roles(sources, turns=config.turns)
    examples, notes = check_texts(examples)
    require_holdout(examples, config)
    _require_models(model, reference_model, look_up=True)
    retain_loss = retain_loss or _loss_without_retain(config, method, examples)
    examples |= substitutes_for(examples["forget"], method, options, config.seed)
    trains = torch.inference_mode(False) if torch.is_inference_mode_enabled() else torch.enable_grad()
    shown = progress if is_main_process() else False
    with trains, folder.claimed(), together(named=True), Progress(shown) as bar, ExitStack() as modes:
        bar.say("loading the model")
        with without_weights(fills_in_weights()):
            lm = LanguageModel.of(model, tokenizer, workspace=config.workspace)
        texts = render(lm, examples, config.template, truncate=config.truncate)

        accelerator = make_accelerator(lm.inner)
        processes = processes_of(accelerator)
        require_shareable(processes, config, lm.module)
        lm = _trainable(lm, config, served, processes)  # the first change of the model
        processes.place(lm.module, lm.inner)
        served.round()
        modes.enter_context(evaluation_mode(lm.module))  # no dropout: log-likelihoods are a function of the weights
        trained = accelerator.unwrap_model(lm.module)
        folder.require_room(trained, merge=config.merge)
        config = replace(config, learning_rate=config.learning_rate or _default_rate(trained, method))
        texts = _in_best_form(lm, texts, config, accelerator, processes, bar)
        session = setup(
            lm,
            config,
            method,
            options,
            retain_loss,
            texts,
            texts.tokens,
            reference_model=reference_model,
            sampled=sampled_texts(folder.checkpoint if resume else None),
            robust=config.robust,
            accelerator=accelerator,
            processes=processes,
            bar=bar,
        )
        checkpoint = Checkpoint(folder.checkpoint, _fingerprint(config, session), session.sampled)
        with listening(on_step, config, folder.path) as listener:
            stopped = _train(session._replace(on_step=listener), config, served, checkpoint, resume, bar)
        bar.say("measuring what is left")
        if config.merge and stopped != "interrupted":
            trained, stopped = served.merged(trained), after_merge(session, stopped)
        inputs = _inputs(lm, reference_model, sources | {"output_dir": output_dir})
        result = result_of(session, config, trained, texts, stopped, inputs)
        result.notes = drawn + notes + notes_of(session, texts, result, config) + served.notes(result)
        if stopped != "interrupted":
            try_attacks(result, session, texts, config, bar, checkpoint)
        if folder.path is not None and stopped != "interrupted":
            _save(result, folder.path, checkpoint, processes, replace=resume)
    return result


def _check_arguments(
    config: UnlearnConfig, on_step: Any, *, resume: Any, progress: Any, output_dir: Any, tokenizer: Any
) -> None:
    """Raise ArgumentError for an argument of the wrong type, and DependencyError for a tracker that is missing."""
    require(Flag(), resume=resume, **({} if progress is None else {"progress": progress}))
    require_path("output_dir", output_dir)
    require_tokenizer("tokenizer", tokenizer)
    require_mask(config.mask)
    require_listeners(on_step, config.log_with)


def require_holdout(examples: dict[str, list[Example]], config: UnlearnConfig) -> None:
    """Raise DataError where the holdout is too small for the attacks on the result, or for other forms of the texts."""
    if config.scope == "person":
        require_forms(examples, non_members_for(config.false_discovery_rate))
    if config.attacks is not None and "holdout" in examples:
        require_enough(len(examples["holdout"]), config.false_discovery_rate)


def _save(result: Result, directory: Path, checkpoint: Checkpoint, processes: Processes, *, replace: bool) -> None:
    """Write the result; the checkpoint stays until it is on the disk."""
    if processes.writes():
        try:
            write_result(result, directory, replace=replace)
        except BaseException:
            if checkpoint.exists:
                logger.warning(f"{checkpoint.path} holds the run: resume=True (--resume) continues it")
            raise
        if processes.is_main:
            checkpoint.delete()
    processes.barrier()


def _inputs(lm: LanguageModel, reference_model: Any, sources: dict[str, Any]) -> dict[str, Any]:
    """Return what the result says of the arguments."""
    names = {"model": model_name(lm), "reference_model": model_name(reference_model)}
    return names | {name: source_name(value) for name, value in sources.items()}


def _require_models(model: Any, reference_model: Any, *, look_up: bool) -> None:
    """Raise for a model that is none; names are looked up on the hub once the texts are checked."""
    require_model("model", model, look_up=look_up)
    if reference_model is not None:
        require_model("reference_model", reference_model, look_up=look_up)


def _default_rate(model: Any, method: Method) -> float:
    """Return the learning rate at which a run starts: that of an adapter or of all weights, for this method."""
    return method.rate * (_ADAPTER_LEARNING_RATE if hasattr(model, "peft_config") else _LEARNING_RATE)


def _trainable(lm: LanguageModel, config: UnlearnConfig, served: ServedFile, processes: Processes) -> LanguageModel:
    """Return the model with the adapter that the settings ask for. Raises ArgumentError for `merge` without one.

    Raises an error, before a change, where the model is not that of the GGUF file.
    """
    served.match(lm, processes, adapts=config.lora is not None, merges=config.merge)
    keep_differentiable(lm.module)
    if config.lora is not None:
        lm = with_lora(lm, config.lora, config.seed)
    if config.merge:
        require_mergeable(lm.module)
    require_trainable(lm.module)
    return lm


def _in_best_form(
    lm: LanguageModel,
    texts: RenderedTexts,
    config: UnlearnConfig,
    accelerator: Any,
    processes: Processes,
    bar: Progress,
) -> RenderedTexts:
    """Return the texts in the rendering that `template` says, chosen here where it is auto; log an example.

    With scope="person" they have their other forms.
    """
    if config.template == "auto" and texts.name is not None:
        bar.say("comparing forms of the records")
        scorer = Scorer(lm, 2 * config.batch_size, autocast=accelerator.autocast, processes=processes)
        texts = likeliest(lm, texts, scorer.token_log_likelihood, truncate=config.truncate)
    change = str if config.show_text else masked
    if processes.is_main and (line := texts.example_line(lm, change=change)):
        logger.info(line)
    if config.scope == "person":
        return with_forms(lm, texts, non_members_for(config.false_discovery_rate))
    return texts


def check_together(config: UnlearnConfig, method: Method, retain: Any, reference_model: Any) -> None:
    """Raise ArgumentError where an argument needs another one that is missing."""
    check_token_weights(config.token_weights, method, has_reference=reference_model is not None)
    require_reduction(config, method)
    if config.robust:
        require_robust(method)
    by_ksd = isinstance(config.difficulty, str) and config.difficulty == "ksd"
    if by_ksd and config.order != "random" and retain is None:
        raise ArgumentError(
            'difficulty="ksd" is how much the training set supports an example: pass some of it as retain='
        )


def require_reduction(config: UnlearnConfig, method: Method) -> None:
    """Raise ArgumentError where batch_reduction="token" does not name what the method computes."""
    if config.batch_reduction == "example":
        return
    if not method.token_mean:
        names = ", ".join(m.name for m in METHODS.values() if m.token_mean)
        raise ArgumentError(
            f'batch_reduction="token" is for methods whose loss is a mean over the tokens of a text ({names}), and '
            f"that of {method.name!r} is none: leave it out"
        )
    if dict(config.method_options or {}).get("top_fraction", 1) != 1:
        raise ArgumentError(
            'batch_reduction="token" is the mean over all tokens of a step, and top_fraction leaves some out: leave '
            "one of them out"
        )


def _loss_without_retain(config: UnlearnConfig, method: Method, examples: dict[str, list[Example]]) -> str | None:
    """Return the retain loss without a retain set.

    It holds text that the model wrote, and the rest of texts of which strings are forgotten.
    """
    if "retain" in examples or config.retain_loss != "auto":
        return None
    if method.retain_loss in ("nll", "hold"):
        return "hold"
    return method.retain_loss if any(e.forget for e in examples["forget"]) else None


def _fingerprint(config: UnlearnConfig, session: Session) -> dict[str, Any]:
    """Return the settings and scores in which a run that resumes from a checkpoint must agree."""
    settings = config.fixed() | {"mask": digest_of(config.mask)}
    if config.l1:
        settings["max_steps"] = session.max_steps  # at which its strength reaches 0
    return settings | {name: values.tolist() for name, values in session.scores.items()}


def _train(
    session: Session, config: UnlearnConfig, served: ServedFile, checkpoint: Checkpoint, resume: bool, bar: Progress
) -> str:
    """Make the optimizer, resume from the checkpoint and run the loop; return the reason why it ended."""
    lm, learning_rate = session.scorer.lm, config.learning_rate
    assert learning_rate is not None
    freeze_rest = session.target.freeze_rest() if session.target else nullcontext()
    recompute = config.gradient_checkpointing or is_recomputing(lm.inner)
    recomputed = recomputed_layers(lm.inner) if recompute else nullcontext()
    with DeferredInterrupt(patient=session.processes.sharded) as interrupt, freeze_rest, recomputed:
        mask = mask_of(
            config.mask, lm.module, session.texts.forget, batch_size=config.batch_size, workspace=config.workspace
        )
        mask, resumable = session.processes.broadcast_masks(mask), checkpoint.path is not None
        weights = TrainedWeights(
            lm.module, learning_rate, resumable=resumable, mask=mask, offload=config.offload_optimizer,
            formats=served.formats, seed=served.seed,
            clipped_to=config.max_grad_norm if config.moments_in_8bit else None,
        )  # fmt: skip
        optimizer = session.accelerator.prepare_optimizer(weights.optimizer)
        if resume:
            checkpoint.load(weights, session.state)
            resume_scores(session)
        stopped = ascend(session, weights, optimizer, config, checkpoint, interrupt, bar)
    interrupt.redeliver(session.processes.any if stopped == "interrupted" else bool)
    if stopped == "interrupted":
        refresh(session)
    return stopped
