"""The function `bench`: the published numbers of a model in a benchmark of unlearning."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pyunlearn.benchmarking.attacked import attacked, columns_of, require_attackable
from pyunlearn.benchmarking.config import BenchConfig
from pyunlearn.benchmarking.files import Questions, require_folder
from pyunlearn.benchmarking.measurer import Measurer
from pyunlearn.benchmarking.registry import BENCHMARKS, Benchmark
from pyunlearn.benchmarking.result import BenchResult, Numbers
from pyunlearn.data.files import expanded, parse_json
from pyunlearn.errors import ArgumentError, DataError, brief, missing_packages, nearest
from pyunlearn.models.condition import weights_of
from pyunlearn.models.language_model import require_model, require_tokenizer
from pyunlearn.options import Flag, accepts, require
from pyunlearn.output import model_name, versions
from pyunlearn.progress import Progress


@accepts(BenchConfig)
def bench(
    benchmark: str,
    model: Any,
    data: str | Path,
    *,
    retrained: Any = None,
    tokenizer: Any = None,
    config: BenchConfig | str | Path | None = None,
    progress: bool | None = None,
    **settings: Any,
) -> BenchResult:
    """Compute the published numbers of a model in a benchmark of unlearning, with 95 % intervals.

    The benchmark's own files are read from a folder; which ones, and what each column means, is in docs/bench.md. The
    intervals are over the questions, as if these were drawn from more like them: they do not cover another training
    run. The model is not changed.

    Args:
        benchmark: "tofu", "wmdp", "muse" or "rwku".
        model: a transformers causal or encoder-decoder language model, or a path, a .gguf file or a name to load from.
        data: the folder with the benchmark's files, or the name of a data set on the hub, such as "locuslab/TOFU"; a
            name may end in @REVISION, and a folder of that name comes first.
        retrained: a model that was trained without the forget set, same forms as `model`, or the path of the bench.json
            that this function's result was written to for it, with the same questions and rendering. Attacks need the
            model.
        tokenizer: the model's, or where it is. Default: where the model came from.
        config: a BenchConfig, or a TOML file or bench.json to read one from; keywords change single settings of it.
        progress: a progress bar on standard error. Default: where that is a terminal.
        {options}

    Returns:
        BenchResult: `.columns` (name -> Column), `result[name]`, `.numbers` (of each question), `.notes`, `.to_dict()`.

    Raises:
        ArgumentError, DataError, ModelError, DependencyError: an argument that cannot be used.

    Source: TOFU, Maini et al. 2024, arXiv 2401.06121. WMDP, Li et al. 2024, arXiv 2403.03218. MUSE, Shi
    et al. 2024, arXiv 2407.06460. RWKU, Jin et al. 2024, arXiv 2406.10890.
    """
    began = time.perf_counter()
    if not isinstance(benchmark, str) or benchmark.lower() not in BENCHMARKS:
        mend = nearest(benchmark, BENCHMARKS) if isinstance(benchmark, str) else f"choose from {', '.join(BENCHMARKS)}."
        raise ArgumentError(f"benchmark must be one of {', '.join(BENCHMARKS)}, got {brief(benchmark)}: {mend}")
    benchmark = benchmark.lower()
    row, config = BENCHMARKS[benchmark], BenchConfig.of(config, settings, "bench")
    config.require_for(benchmark)
    if retrained is not None and not row.compared:
        raise ArgumentError(f"retrained: {benchmark} compares with no retrained model: leave it out")
    if progress is not None:
        require(Flag(), progress=progress)
    models = {"model": model} | ({} if retrained is None or _is_result(retrained) else {"retrained": retrained})
    for look_up in (False, True):
        for name, each in models.items():
            require_model(name, each, look_up=look_up)
        require_tokenizer("tokenizer", tokenizer)
        if not look_up:
            folder = require_folder(data, row.files(config), row.inside)
            sets = row.read(folder.path, config)
            texts = None if config.attacks is None or row.attacked is None else row.attacked(sets)
            if texts is not None:
                require_attackable(retrained, texts, is_result=_is_result(retrained))
            saved = read_result(retrained, benchmark, sets, row.compared) if _is_result(retrained) else None
            if row.needs_rouge and importlib.util.find_spec("rouge_score") is None:
                raise missing_packages(f"the benchmark {benchmark}", "rouge-score")
    with Progress(progress, "benchmarking") as bar:
        measured = _measured(row, models, tokenizer, sets, config, bar, saved)
        numbers = measured.numbers
        bar.say("computing the intervals")
        columns = row.columns(numbers, measured.retrained, config)
    notes = [*measured.notes, *row.notes(numbers, measured.retrained)]
    if texts is not None:
        result = attacked(models, tokenizer, texts, config, measured.template, progress=progress)
        own, bits = columns_of(result, config.seed)
        columns, numbers, notes = columns + own, numbers | bits, [*notes, result.headline, *result.notes]
    return BenchResult(
        benchmark=benchmark,
        columns={column.name: column for column in columns},
        sets={name: questions.described() for name, questions in sets.items()},
        numbers=numbers,
        rendering=measured.rendering,
        notes=notes,
        settings=versions()
        | {
            "model": model_name(model),
            "weights": measured.weights,
            "data": folder.source,
            "retrained": model_name(retrained) if "retrained" in models else _name(retrained),
        }
        | config.to_dict(),
        seconds=time.perf_counter() - began,
    )


class _Measured(NamedTuple):
    numbers: Numbers
    """Of the model."""
    rendering: str
    template: str | Path
    weights: str
    """Number format of the model's weights."""
    notes: list[str]
    """On what the model wrote."""
    retrained: Numbers | None
    """Of the retrained model, if one is compared."""


def _measured(
    row: Benchmark,
    models: Mapping[str, Any],
    tokenizer: Any,
    sets: Mapping[str, Questions],
    config: BenchConfig,
    bar: Progress,
    saved: SavedResult | None,
) -> _Measured:
    """Measure the model and the retrained one; one model is in memory at a time.

    Raises ArgumentError where the saved result of a retrained model is of another rendering, before anything is read.
    """
    bar.say("loading")
    measurer = Measurer(models["model"], tokenizer, config, bar, "the model")
    rendering = row.rendering(measurer)
    if saved is not None and saved.rendering != rendering:
        raise ArgumentError(
            f"the retrained model's result {saved.path} has the questions in another form, {saved.rendering}, and here "
            f"they are read as {rendering}: give both the same template"
        )
    numbers = row.measure(measurer, sets, config)
    retrained, tokenizer = None if saved is None else saved.numbers, measurer.lm.tokenizer
    weights = weights_of(measurer.lm.module)
    measured = _Measured(numbers, rendering, measurer.template, weights, measurer.notes, retrained)
    if "retrained" not in models:
        return measured
    del measurer
    bar.say("loading")
    measurer = Measurer(models["retrained"], tokenizer, config, bar, "the retrained model")
    compared = {name: sets[name] for name in row.compared}
    return measured._replace(retrained=row.measure(measurer, compared, config, retrained=True))


def _is_result(retrained: Any) -> bool:
    return isinstance(retrained, (str, Path)) and str(retrained).lower().endswith(".json")


def _name(retrained: Any) -> str | None:
    """Return the name of a result's file, without its path where that is absolute."""
    return None if retrained is None else Path(retrained).name if Path(retrained).is_absolute() else str(retrained)


class SavedResult(NamedTuple):
    """Part of a retrained model's bench.json that is compared."""

    path: str
    rendering: Any
    numbers: Numbers


def read_result(
    path: str | Path, benchmark: str, sets: Mapping[str, Questions], compared: Mapping[str, tuple[str, ...]]
) -> SavedResult:
    """Return what is compared of a retrained model's bench.json.

    Raises DataError where it is no such file, damaged, or of another benchmark or other questions.
    """
    name = f"the retrained model's result {path}"
    try:
        content = parse_json(expanded(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror}; check its path") from error
    except ValueError as error:  # no UTF-8, no JSON
        raise DataError(f"{name} is no JSON: wanted the bench.json that pyunlearn bench writes") from error
    parts = content if isinstance(content, dict) else {}
    if not all(isinstance(parts.get(key), dict) for key in ("sets", "numbers")):
        raise DataError(f"{name} has no numbers of a benchmark: wanted the bench.json that pyunlearn bench writes")
    if parts.get("benchmark") != benchmark:
        raise DataError(f"{name} is of the benchmark {brief(parts.get('benchmark'))}: wanted one of {benchmark}")
    for each in compared:
        there = parts["sets"].get(each)
        if not isinstance(there, dict) or there.get("sha256") != sets[each].sha256:
            count = there.get("questions") if isinstance(there, dict) else None
            raise DataError(
                f"{name} is of other questions of the set {each}, {count} and not {len(sets[each].rows)} or with other "
                "words: run it with the same data, split and first"
            )
    numbers = _arrays(parts["numbers"], compared)
    if any(len(x) != len(sets[each].rows) for each in numbers for x in numbers[each].values()):
        raise DataError(f"{name} is damaged: run its benchmark again")
    return SavedResult(str(path), parts.get("rendering"), numbers)


def _arrays(content: Mapping[str, Any], compared: Mapping[str, tuple[str, ...]]) -> Numbers:
    """Return the numbers that are compared; an empty array in place of one that is not there or no numbers."""
    numbers: Numbers = {}
    for each, keys in compared.items():
        numbers[each] = {}
        for key in keys:
            try:
                values = np.asarray(content[each][key], dtype=np.float64)
            except (KeyError, TypeError, ValueError):
                values = np.empty(0)
            fine = values.ndim == (2 if key == "wrong" else 1) and bool(np.isfinite(values).all())
            numbers[each][key] = values if fine else np.empty(0)
    return numbers
