"""The evaluation of the metrics: what each says of models of which it is known what it should say."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pyunlearn.errors import ArgumentError, OutputError
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.options import Flag, Whole, require, require_path
from pyunlearn.progress import Progress
from pyunlearn.study.calls import Evidence, calls, unseen_scores
from pyunlearn.study.config import StudyConfig
from pyunlearn.study.folder import Folder, Row
from pyunlearn.study.models import load_model
from pyunlearn.study.plan import FILE as PLAN
from pyunlearn.study.readings import Reader, Reading, View
from pyunlearn.study.seeds import Inputs, model_name
from pyunlearn.study.sets import ForgetSet
from pyunlearn.study.study import Paths, checked_device, inputs_of
from pyunlearn.study.trust import RULE, sanity_lines, summary, table
from pyunlearn.study.unlearners import (
    NOTHING,
    REFUSE,
    RETRAINED,
    TRAINED,
    UNLEARNERS,
    Target,
    refuse_always,
    unlearned,
)

FEWEST_SEEDS = 6
"""The set's own model, a retrained one, a reference, and three more that never saw the set."""
_ORACLES = 3  # retrained models of each set, at most
_FEWEST_NON_MEMBERS, _MOST_NON_MEMBERS = 19, 249


@dataclass(frozen=True)
class MetricEvaluation:
    """The evaluation of the metrics of unlearning on the models of a study."""

    folder: Path
    """The folder with metrics.json, metrics.csv, states.csv, and the calls on each model."""
    rows: list[dict[str, Any]]
    """One for each kind of forget set and metric: the columns of metrics.csv."""
    states: list[dict[str, Any]] = field(repr=False)
    """One for each kind, dose and unlearner: where it leaves the set, and what it costs."""
    sanity: list[str]
    """What the audit says of retrained, untouched and ruined models: a sentence for each kind and form of the audit."""
    rule: str
    """How `trusted_for` follows from the numbers."""


def evaluate_metrics(
    study: str | Path,
    *,
    corpus: Paths | None = None,
    test_corpus: Paths | None = None,
    seeds: int | None = None,
    out: str | Path | None = None,
    device: str | None = None,
    progress: bool | None = None,
) -> MetricEvaluation:
    """Evaluate the metrics of unlearning on the models of a finished study, of which none is trained again.

    Each forget set is audited under the model that was trained on it, under models of other seeds, which are retrained
    models of it, and under the first model after each of the sanity unlearners: refuse always, noise, random
    relabelling, collapse, gradient ascent. Non-members are examples of the same kind of further seeds. Each metric says
    "still known", "clean" or "damaged" by a rule at 5 %. The same call resumes an interrupted evaluation.

    Args:
        study: the folder of the study.
        corpus: the corpus that the study had, same forms; None: the built-in one.
        test_corpus: the test corpus that it had.
        seeds: audit the forget sets of this many seeds, the first ones; default: of all. A call with more resumes.
        out: folder of the evaluation; default: the folder "metrics" in that of the study.
        device: "cpu" or "cuda"; default: a GPU where there is one.
        progress: a progress bar on standard error; default: if that is a terminal.

    Returns:
        MetricEvaluation: `.folder`, `.rows`, `.states`, `.sanity`, `.rule`.

    Raises:
        ArgumentError, DataError, ModelError, OutputError: an argument cannot be used; the study is not finished, has
            another corpus, fewer than 6 seeds or fewer than 19 non-members a set.

    Source: the sanity unlearners and the per-example standard after Hayes et al. 2024, arXiv 2403.01218; the evaluation
        of metrics by models that know and that do not after OpenUnlearning, arXiv 2506.12618.
    """
    for name, path in (("study", "" if study is None else study), ("out", out)):
        require_path(name, path)
    if progress is not None:
        require(Flag(), progress=progress)
    if seeds is not None:
        require(Whole(1), seeds=seeds)
    inputs = _finished(Path(study), corpus, test_corpus, checked_device(device))
    settings = {"study": inputs.folder.read_json("config.json"), "oracles": _ORACLES}
    folder = Folder(Path(study) / "metrics" if out is None else out, settings)
    bar = Progress(progress, "metrics")
    try:
        states = _Evaluation(inputs, folder, bar, seeds or inputs.config.seeds).states()
    finally:
        bar.close()
    rows, places = table(states), summary(states)
    folder.table("metrics", rows)
    folder.table("states", places)
    lines = sanity_lines(rows)
    content = {"rule": RULE, "sanity": lines, "unlearners": UNLEARNERS, "metrics": rows, "states": places}
    folder.json("metrics.json", content)
    return MetricEvaluation(folder.path, rows, places, lines, RULE)


def _finished(path: Path, corpus: Paths | None, test_corpus: Paths | None, device: str) -> Inputs:
    """Return the inputs of a finished study. Raises OutputError where it is none, ArgumentError for another corpus."""
    if not (path / "config.json").exists() or not (path / PLAN).exists():
        raise OutputError(f"{path} holds no study: give the folder of a finished one (`pyunlearn study --out FOLDER`)")
    config = StudyConfig.read(path / "config.json")
    if config.twin is not None:
        raise ArgumentError(
            f"the study in {path} is one of twins, with one model that saw its texts and one that did not, and the "
            f"evaluation needs {FEWEST_SEEDS} models with texts of their own: give a study of another setup"
        )
    inputs = inputs_of(path, config, corpus, test_corpus, device)
    missing = [s for s in range(config.seeds) if not (path / "models" / model_name(config, s)).exists()]
    if missing:
        raise OutputError(f"the model of seed {missing[0]} is missing in {path}: run the study to its end first")
    non_members = (config.seeds - 3) * len(config.doses) * config.examples
    if config.seeds < FEWEST_SEEDS or non_members < _FEWEST_NON_MEMBERS:
        raise ArgumentError(
            f"the study in {path} has {config.seeds} seeds and leaves {max(0, non_members)} non-members a set, and the "
            f"evaluation needs {FEWEST_SEEDS} and {_FEWEST_NON_MEMBERS}: run one with more seeds or examples"
        )
    return inputs


class _Evaluation:
    """Reads every model, audits every set under it, and writes one file for each model and set."""

    def __init__(self, inputs: Inputs, folder: Folder, bar: Progress, audited: int) -> None:
        self.inputs, self.folder, self.bar = inputs, folder, bar
        self.audited = range(min(audited, inputs.config.seeds))
        self.sets, self.seeds = inputs.sets, inputs.config.seeds
        self.reader = Reader(self.sets, inputs.tokenizer)
        self.family: list[Reading] = []

    def states(self) -> list[Row]:
        """Return the calls on every model, in order; those that are in the folder are not made again."""
        names = [self._file(u, which, k) for which in self._audited() for u, k in self._models(which)]
        done = sum(map(self.folder.has, names))
        if done < len(names):
            self.bar.begin("models and sets", len(names))
            self.bar.advance(done)
            self.family = [self._read_model(seed) for seed in range(self.seeds)]
            for seed in self.audited:
                self._run_seed(seed)
        return [self.folder.read_json(name) for name in names]

    def _audited(self) -> list[ForgetSet]:
        return [which for which in self.sets.forget if which.seed in self.audited]

    def _models(self, which: ForgetSet) -> Iterator[tuple[str, int]]:
        """Yield (unlearner, seed of the model) for each model under which a set is audited."""
        yield NOTHING, which.seed
        yield from ((RETRAINED, k) for k in self._oracles(which.seed))
        yield from ((name, which.seed) for name in TRAINED)

    def _oracles(self, seed: int) -> list[int]:
        return [(seed + k) % self.seeds for k in range(1, min(_ORACLES, self.seeds - 1) + 1)]

    def _file(self, unlearner: str, which: ForgetSet, model: int) -> str:
        return f"calls/{unlearner.replace(' ', '-')}-{which}-model{model}.json"

    def _load(self, seed: int) -> LanguageModel:
        path = self.inputs.folder.path / "models" / model_name(self.inputs.config, seed)
        return load_model(path, self.inputs.tokenizer, self.inputs.device)

    def _read_model(self, seed: int) -> Reading:
        """Read every forget example with the model of a seed, and probe the sets that are audited under it."""
        self.bar.say(f"reading with the model of seed {seed}")
        probed = [i for w in self._audited() for i in self.sets.forget[w] if self._is_probed(w.seed, seed)]
        return self.reader.read(self._load(seed), self.sets.scored(), probed, f"the model of seed {seed}")

    def _is_probed(self, owner: int, model: int) -> bool:
        reference = model in {self._reference(owner, k) for k in (owner, *self._oracles(owner))}
        return model in (owner, *self._oracles(owner)) or reference

    def _reference(self, owner: int, model: int) -> int:
        """Return the model that takes the place of a retrained one: the next that is neither of the two."""
        return next(k for n in range(1, 4) if (k := (model + n) % self.seeds) not in (owner, model))

    def _run_seed(self, seed: int) -> None:
        sets = [which for which in self.sets.forget if which.seed == seed]
        for which in sets:
            for name, k in self._models(which):
                if name in (NOTHING, RETRAINED):
                    self._judge(name, which, k, lambda k=k: self.family[k])  # type: ignore[misc]
        if all(self.folder.has(self._file(name, w, seed)) for w in sets for name in TRAINED):
            return
        lm = self._load(seed)
        original = {key: value.clone() for key, value in lm.module.state_dict().items()}
        refusing: list[Reading] = []

        def refused() -> Reading:
            if not refusing:
                every = [i for w in sets for i in self.sets.forget[w]]
                refuse_always(lm, self.sets, seed, np.random.default_rng((self.inputs.config.seed, seed, 2)))
                refusing.append(self.reader.read(lm, self.sets.scored(), every, REFUSE))
            return refusing[0]

        for name in TRAINED:
            for which in sets:
                lm.module.load_state_dict(original)

                def changed(name: str = name, which: ForgetSet = which) -> Reading:
                    if name == REFUSE:
                        return refused()
                    unlearned(lm, name, self.inputs.config, self.sets, Target(which, self._level(which)))
                    keys = [i for w, g in self.sets.forget.items() if w.kind == which.kind for i in g]
                    return self.reader.read(lm, keys, self.sets.forget[which], name)

                self._judge(name, which, seed, changed)

    def _non_members(self, which: ForgetSet, away: set[int]) -> list[int]:
        """Return examples of the same kind of further seeds, the same at every call."""
        others = [i for w, g in self.sets.forget.items() if w.kind == which.kind and w.seed not in away for i in g]
        rng = np.random.default_rng(zlib.crc32(str(which).encode()))
        return sorted(rng.permutation(others)[:_MOST_NON_MEMBERS].tolist())

    def _level(self, which: ForgetSet) -> float:
        """Return the mean NLL of a set under the models that never saw it."""
        others = [k for k in range(self.seeds) if k != which.seed]
        return float(np.mean([self.family[k].nll(self.sets.forget[which]) for k in others]))

    def _judge(self, name: str, which: ForgetSet, model: int, read: Callable[[], Reading]) -> None:
        """Audit a set under a model, and write what each metric says, unless it is written."""
        file = self._file(name, which, model)
        if self.folder.has(file):
            return
        self.bar.say(f"{name}: {which}")
        now, forget, reference = read(), self.sets.forget[which], self._reference(which.seed, model)
        others = self._non_members(which, {which.seed, model, reference})
        unseen = [self.family[k] for k in range(self.seeds) if k not in (which.seed, model)]
        view = View(forget, others, now, self.family[which.seed], self.family[reference])
        test = np.array([r.nll(self.reader.test).mean() for r in unseen])
        evidence = Evidence(self.reader, view, unseen_scores(unseen, forget), test)
        rows = {metric: call._asdict() for metric, call in calls(evidence).items()}
        self.folder.json(
            file,
            {
                "unlearner": name,
                **which._asdict(),
                "model": model,
                "distance": float(now.nll(forget).mean()) - self._level(which),
                "test_nll_rise": evidence.rise,
                "ruined": evidence.ruined,
                "gold": evidence.gold.tolist(),
                "gold_call": evidence.gold_call,
                "metrics": {n: {k: _finite(v) for k, v in row.items()} for n, row in rows.items()},
            },
        )
        self.bar.advance(1)


def _finite(value: Any) -> Any:
    """Return a value for JSON, which has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
