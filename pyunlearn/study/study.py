"""The study from end to end: each stage does what is not done yet, so an interrupted study goes on to the same result."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pyunlearn import __version__
from pyunlearn.data.examples import Example
from pyunlearn.errors import ArgumentError
from pyunlearn.models.from_scratch import train_tokenizer
from pyunlearn.options import accepts
from pyunlearn.progress import Progress
from pyunlearn.report import require_page_packages
from pyunlearn.study.claims import Claim, findings_of, judged
from pyunlearn.study.config import StudyConfig
from pyunlearn.study.corpus import read_corpus, synthetic
from pyunlearn.study.figures import draw_all
from pyunlearn.study.folder import Folder
from pyunlearn.study.old_config import Config, configured
from pyunlearn.study.outcomes import examples_of, outcomes_of, tables
from pyunlearn.study.page import write_page
from pyunlearn.study.reference_models import score_all, train_all
from pyunlearn.study.runs import run_all
from pyunlearn.study.sets import make_sets


@dataclass(frozen=True)
class Study:
    """A finished study."""

    folder: Path
    """Tables, figures, models and index.html, the page to begin with."""
    config: Config
    claims: list[Claim]
    """One verdict on each claim, with the comparisons behind it."""


def _run_study(
    out: str | Path,
    *,
    preset: str = "smoke",
    corpus: str | Path | Sequence[str | Path] | None = None,
    test_corpus: str | Path | Sequence[str | Path] | None = None,
    device: str | None = None,
    progress: bool | None = None,
    **settings: Any,
) -> Study:
    """Repeats the experiment of Baluta et al. 2024 (arXiv 2411.04388): is it harder to forget text in or out of distribution, and at what price?

    Models are trained with forget sets of several kinds, unlearned by gradient ascent, and measured at every few steps. If it was interrupted, the
    same call goes on where it stood, to the same result. On a CPU the same call gives the same numbers.

    Args:
        out: the folder of the study: new, empty, or that of the same study interrupted.
        preset: "smoke", "cpu", "gpu" or "paper".
        corpus: one file of pairs (.tsv, .jsonl, ...), of questions and answers or of plain text, or two files of parallel lines, .gz or plain;
            None: a small corpus made from the seed.
        test_corpus: the same for the held-out text that utility is measured on; None: taken from the corpus.
        device: "cpu", "cuda"; default: a card where there is one.
        progress: a progress bar on standard error; default: if that is a terminal.
        settings: any field of `Config`, to change the preset.

    Returns:
        Study: `.folder`, `.config`, `.claims`.

    Raises:
        ArgumentError, DataError, ModelError, OutputError, DependencyError: something given cannot be used, or a package is missing.
    """
    config = configured(preset, settings)
    require_page_packages()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ArgumentError(
            f"device {device!r} needs a CUDA card, and none is usable here: leave device out, or use cpu"
        )
    examples = (
        synthetic(config.setup, config.corpus_size, config.seed) if corpus is None else read_corpus(_paths(corpus))
    )
    held = None if test_corpus is None else read_corpus(_paths(test_corpus), role="test corpus")
    tokenizer = _tokenizer(config, examples)
    sets = make_sets(config, examples, held, tokenizer)
    folder = Folder(out, config.to_json() | {"corpus": _digest(examples), "test_corpus": _digest(held or [])})
    folder.json("environment.json", environment(device))
    bar = Progress(progress, "study")
    try:
        train_all(folder, config, tokenizer, sets, device, bar.say)
        score_all(folder, config, tokenizer, sets, device, bar.say)
        run_all(folder, config, tokenizer, sets, device, bar.say)
        bar.say("tables, claims, figures")
        return _evaluate(folder, config, tokenizer, sets)
    finally:
        bar.close()


def _evaluate(folder: Folder, config: Config, tokenizer: Any, sets: Any) -> Study:
    examples = examples_of(folder, config, sets)
    outcomes = outcomes_of(folder, config, sets, examples)
    tables(folder, config, sets, examples, outcomes, tokenizer)
    findings = findings_of(config, examples, outcomes)
    claims = judged(findings)
    folder.table("claims", [f._asdict() for f in findings])
    draw_all(folder, config, sets, examples, outcomes)
    write_page(folder, config, sets, examples, outcomes, claims)
    return Study(folder.path, config, claims)


def environment(device: str) -> dict[str, Any]:
    """Versions and hardware: what the numbers may depend on beside the configuration."""
    card = torch.cuda.get_device_name() if device.startswith("cuda") else None
    return {
        "pyunlearn": __version__, "torch": torch.__version__, "transformers": version("transformers"), "python": platform.python_version(),
        "platform": platform.platform(), "device": device, "card": card, "threads": torch.get_num_threads(),
    }  # fmt: skip


def _tokenizer(config: Config, examples: list[Example]) -> Any:
    if config.checkpoint is None:
        return train_tokenizer((t for e in examples for t in (e.prompt, e.completion)), config.vocabulary)
    from pyunlearn.models import load_tokenizer

    return load_tokenizer(config.checkpoint)


def _paths(given: str | Path | Sequence[str | Path]) -> list[str | Path]:
    return [given] if isinstance(given, (str, Path)) else list(given)


def _digest(examples: list[Example]) -> str:
    found = hashlib.sha256()
    for e in examples:
        found.update(f"{e.prompt}\0{e.completion}\0".encode())
    return found.hexdigest()[:16]


@accepts(StudyConfig)
def run_study(
    out: str | Path,
    *,
    corpus: Any = None,
    test_corpus: Any = None,
    device: str | None = None,
    progress: bool | None = None,
    config: Any = None,
    **settings: Any,
) -> Study:
    """Repeat the experiment: out, corpus, test_corpus, device, progress, config.

    Args:
        {options}
    """
    given = dict(vars(StudyConfig.of(config, settings, "run_study")))
    given["references"] = given.pop("non_members")
    return _run_study(out, corpus=corpus, test_corpus=test_corpus, device=device, progress=progress, **given)
