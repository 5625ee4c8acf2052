"""The comparison: every method from the same weights with the same settings, measured at equal utility."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from pyunlearn.comparing.config import CompareConfig
from pyunlearn.comparing.measurement import Criterion
from pyunlearn.comparing.plots import draws_plots, require_plot_package, save_plots
from pyunlearn.comparing.record import record_of, require_same
from pyunlearn.comparing.result import Comparison, Row, check_folder
from pyunlearn.comparing.trial import Restored, run_method
from pyunlearn.data import Example, check_texts, read_roles
from pyunlearn.data.rendering import rendering_of
from pyunlearn.errors import ArgumentError, OutputError, PyunlearnError, TrainingError, brief, printable
from pyunlearn.methods import METHODS, resolve
from pyunlearn.models.harness import HarnessTasks, require_lm_eval
from pyunlearn.models.language_model import LanguageModel, require_model
from pyunlearn.models.scoring import Scorer
from pyunlearn.options import Flag, accepts, require, require_path
from pyunlearn.output import versions
from pyunlearn.probes.non_members import (
    NonMembers,
    calibrated,
    non_members_of_holdout,
    non_members_without_holdout,
    reference_numbers,
)
from pyunlearn.probes.renderings import RenderedTexts, likeliest, render
from pyunlearn.probes.tasks import task_notes
from pyunlearn.progress import Progress
from pyunlearn.unlearning.reference import reference_on_device


@accepts(CompareConfig)
def compare(
    model: Any,
    forget: Any,
    *,
    retain: Any = None,
    holdout: Any = None,
    tokenizer: Any = None,
    reference_model: Any = None,
    output_dir: str | Path | None = None,
    plot: bool | None = None,
    progress: bool | None = None,
    config: CompareConfig | str | Path | None = None,
    **settings: Any,
) -> Comparison:
    """Run several methods from the same weights, and measure how much each forgets at equal utility.

    Each method runs as `pyunlearn.unlearn` runs it, with the same settings. A method that damages the model more also
    forgets more, so before methods are compared each result is mixed with the original,
    theta_a = (1 - a) theta_original + a theta_unlearned, with the largest a that retains `tau` of the original's
    utility (`pyunlearn.edits.calibrate_by_mixing`). That mixture is measured, and in addition the method's own
    result, all against the same non-members under the original model.

    One model is in memory at a time, and in main memory its original weights (of what trains), while mixing twice, and
    the unlearned ones. The model is left as it was, bit for bit.

    Args:
        model: as for `pyunlearn.unlearn`.
        forget: the texts to forget, as for `pyunlearn.unlearn`.
        retain: text that must keep working, trained on by each method (`retain_loss`). The utility is measured on it;
            without it on the holdout, and without that on the non-members.
        holdout: text of the forget set's kind that was never trained on; 19 different texts or more, no copy of a
            forget text among them. Default: as for `pyunlearn.unlearn`.
        tokenizer: needed when `model` is a model object whose name leads to none.
        reference_model: calibrates the verdicts of every row, and npo and others compare with it, as for
            `pyunlearn.unlearn`.
        output_dir: new, empty, or that of an interrupted comparison with the same settings, which then resumes: each
            row is written as soon as it is finished. Rows of methods that are not in `methods` stay; those that are
            must have been made with the same `method_options`. At the end table and plot are written too.
        plot: True writes comparison.svg and comparison.png to `output_dir`; default: where matplotlib is installed.
        progress: bars, and a line for each finished method, on standard error; default: if that is a terminal.
        config: a `CompareConfig`, or a TOML file or result.json that holds one; the keywords below change it.
        {options}

    Returns:
        Comparison: `.rows` (one for each method), `.original`, `.complete`, `.save(dir)`. A method that needs an input
        that is missing has a row that says so (status "refused"), as has one that raised an error ("failed"); the
        others are not lost. Rows of either kind are tried again when a comparison resumes.

    Raises:
        ArgumentError, DataError, ModelError, OutputError, DependencyError: an argument cannot be used, or every method
            refused it; nothing has been written then.
        KeyboardInterrupt: the rows that are finished have been written, and the model is as it was.

    Source: the calibration Wang et al. 2024, arXiv 2406.09179 (UWC); the exposure see
    `pyunlearn.metrics.generalized_exposure`.
    """
    config = CompareConfig.of(config, settings, "compare")
    names = _checked_methods(config)
    _check_arguments(model, reference_model, tokenizer, output_dir, plot, progress)
    if config.tasks is not None:
        require_lm_eval()
    folder = None if output_dir is None else check_folder(output_dir)
    sources = {"forget": forget, "retain": retain, "holdout": holdout}
    examples, drawn = read_roles(sources, turns=config.turns)
    examples, notes = check_texts(examples)
    notes = drawn + notes
    record = record_of(config, names, model, reference_model)
    lm = LanguageModel.of(model, tokenizer, workspace=config.workspace)
    tasks = _tasks(config, lm, progress)
    with Restored(lm) as start:
        texts = _rendered(lm, examples, config, progress)
        criterion, utility_text, reference = _measure_original(lm, texts, config, reference_model, tasks, progress)
        comparison = _start(criterion, utility_text, reference, record, folder)
        comparison.notes = notes + texts.notes(memorized=True) + criterion.notes
        if criterion.task_run is not None:
            comparison.notes += task_notes(criterion.task_run)
        if texts.rendering.key != "file":  # the examples are rendered already
            config = replace(config, template=rendering_of("auto", lm.tokenizer).key)
        inputs = {**texts.rendered, "tokenizer": lm.tokenizer, "reference_model": reference_model, "progress": progress}
        _fill(comparison, names, start, criterion, config, inputs, folder)
    order = {name: rank for rank, name in enumerate(names)}
    comparison.rows.sort(key=lambda row: order.get(row.method, len(order)))
    if folder is not None:
        comparison.save(folder)
        if draws_plots(plot):
            save_plots(comparison, folder)
    return comparison


def _checked_methods(config: CompareConfig) -> list[str]:
    """Return the names of the methods. Raises ArgumentError for an unknown method or option."""
    names = list(METHODS) if config.methods is None else list(config.methods)
    own = config.method_options or {}
    for options in own.values():
        if options is not None and not isinstance(options, Mapping):
            raise ArgumentError(
                f'method_options must be a dict of dicts, as in {{"npo": {{"beta": 0.5}}}}, got {brief(own)}'
            )
    for name in [
        *names,
        *own,
    ]:  # as if each had all the inputs that it needs: one that lacks some is refused in its row
        resolve(name, "auto", True, dict(own.get(name) or {}), True)
    for name in own:
        if name not in names:
            raise ArgumentError(f"method_options are for {name!r}, which is not among the methods: {', '.join(names)}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ArgumentError(
            "compare runs in one process, and was started in several: start it without accelerate launch or torchrun"
        )
    return names


def _check_arguments(
    model: Any, reference_model: Any, tokenizer: Any, output_dir: Any, plot: bool | None, progress: bool | None
) -> None:
    """Raise ArgumentError for an argument of the wrong type; DependencyError where a plot cannot be drawn."""
    for name, value in (("model", model), ("reference_model", reference_model)):
        if isinstance(value, (str, Path)):
            require_model(name, value, look_up=False)
        elif not isinstance(value, (nn.Module, LanguageModel)) and (value is not None or name == "model"):
            raise ArgumentError(
                f"{name} must be a transformers language model, a path or a name, got {type(value).__name__}"
            )
    if tokenizer is not None and not callable(tokenizer):
        require_path("tokenizer", tokenizer)
    require_path("output_dir", output_dir)
    for name, flag in (("plot", plot), ("progress", progress)):
        if flag is not None:
            require(Flag(), **{name: flag})
    if plot and output_dir is None:
        raise ArgumentError("plot=True writes the plot to output_dir, which is missing: give output_dir")
    if plot:
        require_plot_package()


def _tasks(config: CompareConfig, lm: LanguageModel, progress: bool | None) -> HarnessTasks | None:
    """Return the tasks with their documents, loaded before anything is measured; None without tasks."""
    if config.tasks is None:
        return None
    with Progress(progress, "comparing") as bar:
        return HarnessTasks(config.tasks, config.task_limit, lm, lm.tokenizer, bar)


def _rendered(
    lm: LanguageModel, examples: dict[str, list[Example]], config: CompareConfig, progress: bool | None
) -> RenderedTexts:
    """Return the texts in the rendering that `template` says; where it is auto, chosen once for all methods."""
    texts = render(lm, examples, config.template, truncate=config.truncate)
    if config.template != "auto" or texts.name is None:
        return texts
    bar = Progress(progress, "comparing")
    try:
        bar.say("comparing forms of the records")
        score = Scorer(lm, 2 * config.batch_size).token_log_likelihood
        return likeliest(lm, texts, score, truncate=config.truncate)
    finally:
        bar.close()


def _measure_original(
    lm: LanguageModel,
    texts: RenderedTexts,
    config: CompareConfig,
    reference_model: Any,
    tasks: HarnessTasks | None,
    progress: bool | None,
) -> tuple[Criterion, str, NDArray[np.float64] | None]:
    """Measure the original.

    Returns:
        The criterion with that measurement, the name of the text on which utility is measured, and the reference
        model's scores, see `_non_members`.
    """
    bar = Progress(progress, "comparing")
    try:
        bar.say("measuring the original")
        forget, retain = texts.tokens["forget"], texts.tokens.get("retain")
        non_members, reference = _non_members(lm, texts, config, reference_model)
        utility = retain or non_members.tokens
        criterion = Criterion(
            lm,
            examples=texts.examples["forget"],
            forget=forget,
            utility=utility,
            non_members=non_members,
            config=config,
            tasks=tasks,
            bar=bar,
        )
    finally:
        bar.close()
    return criterion, non_members.utility_source if retain is None else "retain set", reference


def _non_members(
    lm: LanguageModel, texts: RenderedTexts, config: CompareConfig, reference_model: Any
) -> tuple[NonMembers, NDArray[np.float64] | None]:
    """Return the non-members of every row, less the reference model's numbers where there is one.

    With them (B + m,) that model's negative log-likelihoods of forget texts and non-members, nats per token, or None.
    """
    forget, examples = texts.tokens["forget"], texts.examples["forget"]
    with reference_on_device(lm, reference_model) as reference:
        is_reference = reference_model is not None
        if "holdout" in texts.tokens:
            non_members = non_members_of_holdout(len(forget), texts.tokens["holdout"])
        else:
            non_members = non_members_without_holdout(
                reference,
                examples,
                forget,
                chat_template=texts.rendering.chat_template,
                is_reference=is_reference,
                seed=config.seed,
            )
        if not is_reference:
            return non_members, None
        scorer = Scorer(lm, 2 * config.batch_size)
        numbers = [reference_numbers(scorer, reference.likelihood, x) for x in (forget, non_members.tokens)]
        scores = np.concatenate([expected.nll for expected in numbers])
        return calibrated(non_members, -scorer.mean_log_likelihood(forget), *numbers), scores


def _start(
    criterion: Criterion,
    utility_text: str,
    reference: NDArray[np.float64] | None,
    record: dict[str, Any],
    folder: Path | None,
) -> Comparison:
    """Return the comparison without rows, or with those in the folder that need not be made again."""
    scores = criterion.scores | ({} if reference is None else {"reference_model": reference})
    comparison = Comparison(
        rows=[],
        original=criterion.original,
        utility_text=utility_text,
        non_members=len(criterion.scores["non_members"]),
        evidence=criterion.non_members.grade,
        scores={role: values.tolist() for role, values in scores.items()},
        settings=record,
    )
    if folder is not None and (folder / "result.json").exists():
        saved = Comparison.read(folder)
        require_same(saved, comparison, folder)
        comparison.rows = [row for row in saved.rows if row.done or row.method not in record["methods"]]
    return comparison


def _fill(
    comparison: Comparison,
    names: list[str],
    start: Restored,
    criterion: Criterion,
    config: CompareConfig,
    inputs: Mapping[str, Any],
    folder: Path | None,
) -> None:
    """Add the missing rows, each written as soon as it is finished.

    Raises the first refusal, if every method refused.
    """
    refusals: list[Exception] = []
    for number, name in enumerate(names, 1):
        if any(row.method == name for row in comparison.rows):
            continue
        began = time.perf_counter()
        try:
            row = run_method(name, start, criterion, config, inputs)
        except Exception as error:  # any error: the other methods are not lost
            row = _row_without_result(name, error)
            refusals += [error] if row.status == "refused" else []
        own = comparison.settings["method_options"].get(name, {})
        comparison.rows.append(replace(row, versions=versions(), method_options=own))
        if len(refusals) == len(names):
            raise refusals[0]
        if len(refusals) < len(comparison.rows) and folder is not None:
            comparison.write(folder)
        _print_row(row, f"{number} of {len(names)}", time.perf_counter() - began, inputs["progress"])


def _row_without_result(name: str, error: Exception) -> Row:
    refused = isinstance(error, PyunlearnError) and not isinstance(error, (TrainingError, OutputError))
    message = printable(" ".join(str(error).split()))
    return Row(name, "refused" if refused else "failed", message if refused else f"{type(error).__name__}: {message}")


def _print_row(row: Row, counter: str, seconds: float, progress: bool | None) -> None:
    if not (sys.stderr.isatty() if progress is None else progress):
        return
    summary = row.reason
    if row.calibrated is not None and row.uncalibrated is not None:
        summary = (
            f"exposure {row.calibrated.exposure.estimate:.2f} bits at weight {row.weight:.2f} "
            f"({row.uncalibrated.exposure.estimate:.2f} before mixing), {row.steps} steps, "
            f"{row.seconds:.0f} s of {seconds:.0f} s, {row.stopped}"
        )
    print(f"{counter}  {row.method}: {row.status}, {summary}", file=sys.stderr, flush=True)
