"""The study from end to end: each stage skips what is finished, so an interrupted study resumes to the same result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pyunlearn.data.examples import Example
from pyunlearn.errors import ArgumentError
from pyunlearn.models.devices import default_device
from pyunlearn.models.from_scratch import train_tokenizer
from pyunlearn.options import Choice, Flag, Text, accepts, require, require_path
from pyunlearn.progress import Progress
from pyunlearn.report import require_page_packages
from pyunlearn.study.claims import primary_claims, secondary_claims, variants
from pyunlearn.study.config import StudyConfig
from pyunlearn.study.corpus import Dosed, read_corpus, read_doses, synthetic
from pyunlearn.study.environment import environment
from pyunlearn.study.figures import draw_all
from pyunlearn.study.folder import Folder
from pyunlearn.study.outcomes import examples_of, outcomes_of
from pyunlearn.study.page import notes_of, notes_of_twins, write_page
from pyunlearn.study.plan import FREE, write_plan
from pyunlearn.study.result import Study
from pyunlearn.study.runs import require_method
from pyunlearn.study.seeds import Inputs, run_seeds, score_twins
from pyunlearn.study.sets import Sets, make_sets
from pyunlearn.study.tables import write_tables
from pyunlearn.study.twins import kinds_of, twin_sets, twin_tokenizer

Paths = str | Path | Sequence[str | Path]


@accepts(StudyConfig)
def run_study(
    out: str | Path,
    *,
    corpus: Paths | None = None,
    test_corpus: Paths | None = None,
    device: str | None = None,
    progress: bool | None = None,
    config: StudyConfig | str | Path | None = None,
    **settings: Any,
) -> Study:
    """Repeat the experiment of Baluta et al. 2024 (arXiv 2411.04388) on any corpus.

    Is it harder to forget text in or out of distribution, and at what price? Each seed trains one model with its own
    forget sets of several kinds; the models of the other seeds show where retraining without them would end. Sets are
    unlearned by gradient ascent, and up to five claims are decided by t tests over seeds. The same call resumes an
    interrupted study, to the same result. On a CPU the same call gives the same numbers.

    Setup twins trains nothing: it unlearns disjoint sets of texts from a checkpoint that saw them at random doses, as
    those of Hubble (arXiv 2510.19811) did; a twin of the same training without them shows where retraining would end.

    With `processes` above 1 new Python processes start: in a script, call it under `if __name__ == "__main__":`.

    Args:
        out: the folder of the study: new, empty, or that of the same study interrupted.
        corpus: one file of pairs (.tsv, .jsonl, ...), of questions and answers or of plain text, or two files of
            parallel lines, .gz or plain; None: a small corpus made from the seed. In setup twins: files (.jsonl, .csv,
            .parquet, ...) with the texts, a column "duplicates" or "dose", how often each was inserted, and perhaps one
            of kinds, "kind".
        test_corpus: the same for the held-out text that utility is measured on; None: taken from the corpus.
        device: "cpu" or "cuda"; default: a GPU where there is one.
        progress: a progress bar on standard error; default: if that is a terminal.
        config: a `StudyConfig`, or a TOML file or the config.json of a study; the keywords below change it. Their
            defaults are those of the preset smoke.
        {options}

    Returns:
        Study: `.folder`, `.config`, `.claims`, `.secondary`, `.notes`, `.plan`.

    Raises:
        ArgumentError, DataError, ModelError, OutputError, DependencyError: an argument cannot be used, or a package is
            missing.
    """
    config = StudyConfig.of(config, settings, "run_study")
    device = checked_device(device)
    _check_arguments(config, out, corpus, test_corpus, progress)
    require_page_packages()
    config, tokenizer, sets, digests = _material(config, corpus, test_corpus)
    fixed = {name: value for name, value in config.to_dict().items() if name not in FREE}
    folder = Folder(out, fixed | digests)
    counts: dict[str, Any] = {"background examples": len(sets.background), "test examples": len(sets.test)}
    counts["share of training rows out of distribution"] = round(sets.outside_share(config), 6)
    if config.twin is not None:  # its training is not ours
        counts = {"test examples": len(sets.test)}
    plan = write_plan(folder, config, digests | counts)
    folder.json("environment.json", environment(device))
    bar = Progress(progress, "study")
    try:
        inputs = Inputs(folder, config, tokenizer, sets, device)
        if config.twin is not None:
            score_twins(inputs, bar.say)
        run_seeds(inputs, bar.say)
        bar.say("claims, tables, figures")
        return _evaluate(inputs, plan)
    finally:
        bar.close()


def _evaluate(inputs: Inputs, plan: str) -> Study:
    folder, config, sets = inputs.folder, inputs.config, inputs.sets
    examples = examples_of(folder, config, sets)
    outcomes = outcomes_of(folder, config, sets, examples)
    claims = primary_claims(config, examples, outcomes)
    secondary = secondary_claims(config, examples, outcomes)
    rows = variants(config, examples, outcomes, claims)
    if config.twin is None:
        notes = notes_of(config, sets, outcomes)
    else:
        notes = notes_of_twins(config, sets, examples, outcomes)
    write_tables(inputs, examples, outcomes, [*claims, *secondary], rows)
    draw_all(folder, config, outcomes, claims)
    study = Study(folder.path, config, claims, secondary, notes, plan)
    write_page(study, folder, sets, outcomes, rows)
    return study


def inputs_of(path: Path, config: StudyConfig, corpus: Paths | None, test_corpus: Paths | None, device: str) -> Inputs:
    """Return the inputs of the study in a folder that has one. Raises ArgumentError for other corpora."""
    saved = json.loads((path / "config.json").read_text(encoding="utf-8"))
    examples, test = _examples(config, corpus, test_corpus)
    for name, digest in _digests(examples, test).items():
        if saved.get(name) != digest:
            raise ArgumentError(
                f"{name} is not that of the study in {path}: give the files that `pyunlearn study` was given there"
            )
    tokenizer = _tokenizer(config, examples)
    return Inputs(Folder(path, saved), config, tokenizer, make_sets(config, examples, test, tokenizer), device)


class _Material(NamedTuple):
    """Settings, tokenizer, examples and digests of the corpora of a study."""

    config: StudyConfig
    """In setup twins with the kinds that the corpus has."""
    tokenizer: Any
    sets: Sets
    digests: dict[str, str]


def _material(config: StudyConfig, corpus: Paths | None, test_corpus: Paths | None) -> _Material:
    """Read the corpora, and make the sets of them."""
    if config.twin is None:
        examples, test = _examples(config, corpus, test_corpus)
        tokenizer = _tokenizer(config, examples)
        return _Material(config, tokenizer, make_sets(config, examples, test, tokenizer), _digests(examples, test))
    test = None if test_corpus is None else read_corpus(_paths(test_corpus), role="test corpus")
    texts = read_doses([] if corpus is None else _paths(corpus))
    config, tokenizer = replace(config, kinds=kinds_of(config, texts)), twin_tokenizer(config, texts)
    return _Material(config, tokenizer, twin_sets(config, texts, test, tokenizer), _digests(texts, test))


def _examples(
    config: StudyConfig, corpus: Paths | None, test_corpus: Paths | None
) -> tuple[list[Example], list[Example] | None]:
    """Return the examples of the corpus, built in where there is none, and of the test corpus if there is one."""
    if corpus is None:
        examples = synthetic(config.setup, config.corpus_size, config.seed)
    else:
        examples = read_corpus(_paths(corpus))
    return examples, None if test_corpus is None else read_corpus(_paths(test_corpus), role="test corpus")


def _check_arguments(config: StudyConfig, out: Any, corpus: Any, test_corpus: Any, progress: Any) -> None:
    """Raise ArgumentError for an argument that cannot be used."""
    require_method(config.method)
    require_path("out", "" if out is None else out)
    for name, paths in (("corpus", corpus), ("test_corpus", test_corpus)):
        for path in paths if isinstance(paths, (list, tuple)) else [paths]:
            require_path(name, "" if path is None and paths is not None else path)
    if progress is not None:
        require(Flag(), progress=progress)


def checked_device(device: str | None) -> str:
    """Return the device, by default a GPU where there is one. Raises ArgumentError for one that cannot be used."""
    if device is None:
        device = default_device().type
        return device if device in ("cpu", "cuda") else "cpu"  # the others' random state is in no checkpoint
    require(Text('"cpu" or "cuda"'), device=device)
    require(Choice(("cpu", "cuda")), device=device.partition(":")[0])
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ArgumentError(
            f"device {device!r} needs a CUDA GPU, and none is usable here: leave device out, or use cpu"
        )
    return device


def _tokenizer(config: StudyConfig, examples: list[Example]) -> Any:
    if config.checkpoint is None:
        return train_tokenizer((t for e in examples for t in (e.prompt, e.completion)), config.vocabulary)
    from pyunlearn.models import load_tokenizer

    return load_tokenizer(config.checkpoint)


def _paths(paths: Paths) -> list[str | Path]:
    return [paths] if isinstance(paths, (str, Path)) else list(paths)


def _digests(corpus: Sequence[Example | Dosed], test: Sequence[Example] | None) -> dict[str, str]:
    return {"corpus": _digest(corpus), "test_corpus": _digest(test or [])}


def _digest(examples: Sequence[Example | Dosed]) -> str:
    digest = hashlib.sha256()
    for e in examples:
        texts = (e.prompt, e.completion) if isinstance(e, Example) else (e.example.prompt, e.example.completion, *e[1:])
        digest.update("".join(f"{part}\0" for part in texts).encode())
    return digest.hexdigest()[:16]
