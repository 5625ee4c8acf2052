"""The comparison: for each method the same start, the same settings, mixing to equal utility, the same yardstick."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pyunlearn import models
from pyunlearn.comparing.config import CompareConfig
from pyunlearn.comparing.measurement import UTILITY_METRICS, Yardstick
from pyunlearn.comparing.plots import save_plots
from pyunlearn.comparing.result import Comparison, Row, check_folder
from pyunlearn.comparing.trial import Restored, run_method
from pyunlearn.data.examples import read_examples
from pyunlearn.errors import ArgumentError, OutputError, PyunlearnError, TrainingError, nearest
from pyunlearn.methods import ALIASES, METHODS
from pyunlearn.models.loading import encoded
from pyunlearn.models.sampling import require_enough, sampled
from pyunlearn.options import accepts
from pyunlearn.output import model_name, shown, versions
from pyunlearn.progress import Progress
from pyunlearn.unlearning.api import _unlearn as unlearn

_OURS = (
    "model",
    "forget",
    "retain",
    "holdout",
    "tokenizer",
    "method",
    "method_options",
    "output_dir",
    "resume",
    "progress",
)
_DEFAULTS = {n: p.default for n, p in inspect.signature(unlearn).parameters.items() if n not in _OURS}
_UTILITY_TEXTS = {"retain": "retain set", "holdout": "holdout"}


def _compare(
    model: Any,
    forget: Any,
    *,
    methods: Sequence[str] | None = None,
    method_options: Mapping[str, dict[str, Any]] | None = None,
    retain: Any = None,
    holdout: Any = None,
    tokenizer: Any = None,
    tau: float = 0.95,
    metric: str = "probability",
    output_dir: str | Path | None = None,
    plot: bool | None = None,
    progress: bool | None = None,
    **options: Any,
) -> Comparison:
    """Runs several methods from the same weights, and measures what each forgets at equal utility.

    Each method runs as `pyunlearn.unlearn` runs it, under the same settings. A method that costs more than another forgets more, so before anything is
    compared each result is mixed with the original, theta_a = (1 - a) theta_original + a theta_unlearned, with the largest a that keeps `tau` of the
    original's utility (`pyunlearn.edits.calibrate_by_mixing`). Measured is that mixture, and the method's own result beside it, all against the same
    references under the original model.

    One model is in memory at a time; beside it stand its original weights (of what trains) in main memory, while mixing twice, and the unlearned ones. The model
    given is left as it came, bit for bit.

    Args:
        model: as for `pyunlearn.unlearn`.
        forget: what is to be forgotten, as for `pyunlearn.unlearn`.
        methods: names, as `pyunlearn methods` lists them, and those with a retain loss ("npo+nll", "graddiff"). Default: all.
        method_options: method -> its own options, such as {"npo": {"beta": 0.5}}.
        retain: text that must keep working, trained on by each method (`retain_loss`). The utility is measured on it; without it on the holdout, and without
            that on text sampled from the model.
        holdout: text of the forget set's kind that was never trained on; 19 texts or more. Default: sampled from the model.
        tokenizer: needed when `model` is a model object whose name leads to none.
        tau: the share of the original's utility that each method has to keep, above 0 and at most 1.
        metric: the utility, one of `UTILITY_METRICS`. "probability": mean over texts of exp(mean log-likelihood a token), so 0.95 allows about 0.05 nats.
            "extraction_strength" is the source's: for utility text that the model recites.
        output_dir: new, empty, or of an interrupted comparison with the same settings, which then goes on: each row is written when it is there. Rows of
            methods that are no longer asked for stay. At the end table and plot are written too.
        plot: whether `output_dir` gets comparison.svg and comparison.png; default: where matplotlib is installed.
        progress: bars, and a line for each finished method, on standard error; default: if that is a terminal.
        options: everything else that `pyunlearn.unlearn` takes (learning_rate, batch_size, max_steps, until, utility_budget, seed, ...), the same for
            each method.

    Returns:
        Comparison: `.rows` (one for each method), `.original`, `.complete`, `.save(dir)`. A method that needs what was not given has a row that says so
        (status "refused"), as has one that broke ("failed"); the others are not lost. Rows of either kind are tried again when a comparison goes on.

    Raises:
        ArgumentError, DataError, ModelError, OutputError: something given cannot be used, or every method refused it; nothing has been written then.
        KeyboardInterrupt: the rows that are finished have been written, and the model is as it came.

    Source: the calibration Wang et al. 2024, arXiv 2406.09179 (UWC); the exposure see `pyunlearn.metrics.generalized_exposure`.
    """
    names = _checked(methods, method_options, tau, metric, options)
    target = None if output_dir is None else check_folder(output_dir)
    sources = {"forget": forget, "retain": retain, "holdout": holdout}
    examples = {role: read_examples(source, role=role) for role, source in sources.items() if source is not None}
    own = {name: given for name, given in (method_options or {}).items() if given}
    options = _DEFAULTS | options
    settings = versions() | {
        name: type(value).__name__ if isinstance(value, Mapping) else shown(value) for name, value in options.items()
    }  # a mask is too long to show
    settings |= {"model": model_name(model), "tau": tau, "metric": metric, "method_options": own}
    if isinstance(model, (str, Path)):
        model, tokenizer = models.load(model, tokenizer=tokenizer)
    models.require_language_model(model)
    tokenizer = models.tokenizer_of(model, tokenizer)
    run = {**options, **examples, "tokenizer": tokenizer, "progress": progress}
    with Restored(model) as start:
        bar = Progress(progress, "comparing")
        try:
            bar.say("measuring the original")
            tokens = encoded(model, tokenizer, examples, options["truncate"])
            references = tokens.get("holdout") or sampled(model, tokenizer, tokens["forget"], seed=options["seed"])
            require_enough(references, holdout=holdout is not None)
            yardstick = Yardstick(
                model, tokenizer, tokens["forget"], tokens.get("retain") or references, references, metric=metric,
                until=options["until"], batch_size=2 * options["batch_size"], workspace=options["workspace"],
                seed=options["seed"],
            )  # fmt: skip
        finally:
            bar.close()
        found = Comparison(
            [], yardstick.original, next((said for role, said in _UTILITY_TEXTS.items() if role in tokens), "text sampled from the model"),
            len(references), {role: scores.tolist() for role, scores in yardstick.scores.items()}, settings,
        )  # fmt: skip
        if target is not None and (target / "result.json").exists():
            there = Comparison.read(target)
            _require_same(there, found, target)
            found.rows = [row for row in there.rows if row.done or row.method not in names]
        _fill(found, names, start, yardstick, own, run, target)
    order = {name: place for place, name in enumerate(names)}
    found.rows.sort(key=lambda row: order.get(row.method, len(order)))
    if target is not None:
        found.save(target)
        if importlib.util.find_spec("matplotlib") is not None if plot is None else plot:
            save_plots(found, target)
    return found


def _fill(
    found: Comparison, names: list[str], start: Restored, yardstick: Yardstick, method_options: dict[str, dict[str, Any]], run: dict[str, Any],
    target: Path | None,
) -> None:  # fmt: skip
    """Adds the rows that are missing, each written as soon as it is there. Raises the first refusal, if every method was refused."""
    refusals: list[Exception] = []
    for number, name in enumerate(names, 1):
        if any(row.method == name for row in found.rows):
            continue
        began = time.perf_counter()
        try:
            row = run_method(
                name, start, yardstick, found.settings["tau"], {**run, "method_options": method_options.get(name)}
            )
        except Exception as error:  # whatever breaks, the other methods are not lost
            row = _broken(name, error)
            refusals += [error] if row.status == "refused" else []
        found.rows.append(row)
        if len(refusals) == len(names):
            raise refusals[0]
        if len(refusals) < len(found.rows) and target is not None:
            found.write(target)
        _tell(row, number, len(names), time.perf_counter() - began, run["progress"])


def _broken(name: str, error: Exception) -> Row:
    refused = isinstance(error, PyunlearnError) and not isinstance(error, (TrainingError, OutputError))
    said = " ".join(str(error).split())
    return Row(name, "refused" if refused else "failed", said if refused else f"{type(error).__name__}: {said}")


def _checked(
    methods: Sequence[str] | None, method_options: Mapping[str, dict[str, Any]] | None, tau: float, metric: str, options: dict[str, Any]
) -> list[str]:  # fmt: skip
    """The methods' names, once each; raises ArgumentError for what can be seen to be wrong before anything is read."""
    if isinstance(methods, str):
        raise ArgumentError(f"methods must be a list of names, got the one string {methods!r}")
    names = list(METHODS) if methods is None else list(dict.fromkeys(str(name).lower() for name in methods))
    if not names:
        raise ArgumentError("methods must name one method or more, and is empty")
    for name in [*names, *(method_options or {})]:
        if name not in METHODS and name not in ALIASES:
            raise ArgumentError(f"there is no method {name!r}; {nearest(name, [*METHODS, *ALIASES])}")
    for name, own in (method_options or {}).items():
        known = METHODS[ALIASES[name][0] if name in ALIASES else name].options
        if name not in names:
            raise ArgumentError(f"method_options are for {name!r}, which is not among the methods: {', '.join(names)}")
        if wrong := sorted(set(own) - set(known)):
            raise ArgumentError(f"method {name!r} has no option {wrong[0]!r}; it has {', '.join(known) or 'none'}")
    if not isinstance(tau, (int, float)) or not 0 < tau <= 1:
        raise ArgumentError(f"tau must lie above 0 and be at most 1, got {tau!r}")
    if metric not in UTILITY_METRICS:
        raise ArgumentError(f"there is no metric {metric!r}; {nearest(str(metric), UTILITY_METRICS)}")
    for name in options:
        if name not in _DEFAULTS:
            raise ArgumentError(f"compare has no option {name!r}; {nearest(name, _DEFAULTS)}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ArgumentError(
            "compare runs in one process, and was started in several: start it without accelerate launch or torchrun"
        )
    return names


def _require_same(there: Comparison, now: Comparison, target: Path) -> None:
    """Raises OutputError unless the comparison in the folder was made with these texts, this model and these settings."""
    ours = json.loads(json.dumps({k: v for k, v in now.settings.items() if k not in versions()}))
    what = next(
        (f"{k}={there.settings.get(k)!r}, not {v!r}" for k, v in ours.items() if there.settings.get(k) != v), None
    )
    for role, scores in now.scores.items():
        saved = there.scores.get(role, [])
        if what is None and (len(saved) != len(scores) or not np.allclose(saved, scores, rtol=1e-4)):
            what = f"another model or other {role} texts"
    if what is not None:
        raise OutputError(f"the comparison in {target} was made with {what}: give the same, or another folder")


def _tell(row: Row, number: int, count: int, seconds: float, progress: bool | None) -> None:
    if not (sys.stderr.isatty() if progress is None else progress):
        return
    said = row.reason
    if row.calibrated is not None and row.uncalibrated is not None:
        said = (
            f"exposure {row.calibrated.exposure.estimate:.2f} bits at weight {row.weight:.2f} ({row.uncalibrated.exposure.estimate:.2f} before mixing), "
            f"{row.steps} steps, {row.seconds:.0f} s of {seconds:.0f} s, {row.stopped}"
        )
    print(f"{number} of {count}  {row.method}: {row.status}, {said}", file=sys.stderr, flush=True)


@accepts(CompareConfig)
def compare(
    model: Any,
    forget: Any,
    *,
    retain: Any = None,
    holdout: Any = None,
    tokenizer: Any = None,
    reference_model: Any = None,
    config: Any = None,
    output_dir: str | Path | None = None,
    plot: bool | None = None,
    progress: bool | None = None,
    **settings: Any,
) -> Comparison:
    """Run several methods: model, forget, retain, holdout, tokenizer, reference_model, config, output_dir, plot, progress.

    Args:
        {options}
    """
    given = dict(vars(CompareConfig.of(config, settings, "compare")))
    given["until"] = given.pop("target_exposure")
    return _compare(
        model,
        forget,
        retain=retain,
        holdout=holdout,
        tokenizer=tokenizer,
        reference_model=reference_model,
        output_dir=output_dir,
        plot=plot,
        progress=progress,
        **given,
    )
