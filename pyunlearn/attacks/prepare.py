"""Inputs of an attack: the models, the texts in the form in which they are read, and the non-members."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pyunlearn.attacks.config import AttackConfig
from pyunlearn.attacks.judge import non_members_for
from pyunlearn.attacks.target import AttackTexts, Trial
from pyunlearn.data import Example
from pyunlearn.data.comparison import groups_of_copies
from pyunlearn.data.redaction import masked
from pyunlearn.errors import DataError
from pyunlearn.models.condition import to_device
from pyunlearn.models.devices import default_device
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.models.scoring import Scorer, evaluation_mode
from pyunlearn.probes.calibration import Expected
from pyunlearn.probes.non_members import (
    NonMembers,
    evidence_notes,
    non_members_of_holdout,
    non_members_without_holdout,
)
from pyunlearn.probes.renderings import RenderedTexts, likeliest, render
from pyunlearn.probes.unseen import unseen_like
from pyunlearn.progress import Progress, logger

_MOST = 1000  # non-members


class Prepared(NamedTuple):
    """The inputs of an attack."""

    lm: LanguageModel
    control: LanguageModel | None
    original: LanguageModel | None
    rendered: RenderedTexts
    indices: list[int]
    """Of the forget texts that are attacked."""
    texts: AttackTexts
    non_members: NonMembers
    """Those in `texts`."""

    @property
    def expected(self) -> tuple[Expected, Expected]:
        """Numbers of the forget texts and of the non-members if they were unseen; 0 for a holdout."""
        return self.non_members.forget, self.non_members.own


def prepare(
    models: dict[str, Any], tokenizer: Any, examples: dict[str, list[Example]], config: AttackConfig, bar: Progress
) -> Prepared:
    """Load the models, render the texts, and choose the non-members and the forget texts that are attacked.

    Raises DataError and ModelError, as `audit` does.
    """
    bar.say("loading")
    lm = _loaded(models["model"], tokenizer, config)
    rendered = _in_best_form(lm, examples, config, bar)
    control, original = (
        None if models[name] is None else _loaded(models[name], lm.tokenizer, config)
        for name in ("control", "original")
    )
    return arranged(lm, rendered, config, bar, control=control, original=original)


def arranged(
    lm: LanguageModel,
    rendered: RenderedTexts,
    config: AttackConfig,
    bar: Progress,
    *,
    control: LanguageModel | None = None,
    original: LanguageModel | None = None,
    most: int = _MOST,
) -> Prepared:
    """Choose the non-members, at most that many, and the forget texts that are attacked, of texts that are rendered.

    Raises DataError where there are too few non-members, and ModelError for a model with another vocabulary.
    """
    for name, other in (("control", control), ("original", original)):
        if other is not None:
            lm.require_vocabulary(other, name)
    examples, tokens = rendered.examples, rendered.tokens
    non_members, own_examples = _non_members(lm, control, rendered, config, bar)
    require_enough(len(non_members.tokens), config.false_discovery_rate)
    rng = np.random.default_rng(config.seed)
    indices = _drawn(rng, len(tokens["forget"]), config.texts)
    compared = _drawn(rng, len(non_members.tokens), most)
    of_forget, own = (
        Expected(x.nll[np.array(which)], x.greedy_match[np.array(which)])
        for x, which in ((non_members.forget, indices), (non_members.own, compared))
    )
    chosen = non_members._replace(tokens=[non_members.tokens[i] for i in compared], forget=of_forget, own=own)
    texts = AttackTexts(
        forget=[tokens["forget"][i] for i in indices],
        forget_examples=[examples["forget"][i] for i in indices],
        groups=_groups(rendered, "forget", indices),
        non_members=chosen.tokens,
        non_member_groups=_groups(rendered, "holdout", compared) if "holdout" in tokens else compared,
        non_member_examples=None if own_examples is None else [own_examples[i] for i in compared],
        retain=tokens.get("retain", []),
        retain_examples=examples.get("retain", []),
        same_kind="holdout" in tokens or control is not None,
        rendering=rendered.rendering,
        unrendered=_unrendered(rendered, indices, compared),
    )
    return Prepared(lm, control, original, rendered, indices, texts, chosen)


def require_enough(non_members: int, rate: float) -> None:
    """Raise DataError unless there are as many non-members as a verdict on attacks takes."""
    if non_members < (fewest := non_members_for(rate)):
        raise DataError(
            f"attacks compare with {fewest} texts or more that were never trained on, at a false_discovery_rate of "
            f"{rate:g}, and there are {non_members}: give a holdout of {fewest}"
        )


def notes_of(
    prepared: Prepared, verdicts: Sequence[str], named: Sequence[bool], trials: Sequence[Trial], rate: float
) -> list[str]:
    """Return what the verdicts rest on, and what the evidence cannot show: one sentence each.

    Args:
        prepared: the inputs.
        verdicts: on the attacked texts.
        named: True for those that are exposed or come back.
        trials: the first is the model without an attack.
        rate: the false discovery rate.
    """
    texts, n = prepared.rendered, len(prepared.rendered.tokens["forget"])
    notes = list(texts.encoded.notes)
    if len(prepared.indices) < n:
        notes.append(f"{len(prepared.indices)} of {n} forget texts were attacked, drawn at random (--texts).")
    if prepared.control is not None:
        notes.append("Each likelihood is the model's less that of the control, which was attacked in the same way.")
        notes += _without_holdout(prepared.non_members)
    m, n = min((t.compared for t in trials[1:] if t.judged), default=trials[0].compared), len(verdicts)
    fewest = math.ceil(n / (rate * (m + 1)) - 1e-9)
    if not any(named) and fewest > 1:
        notes.append(
            f"{m} non-members can show that texts come back only where about {fewest} or more of these {n} do, or "
            "where many stand out a little."
        )
    return notes + evidence_notes(prepared.non_members, verdicts, rate=rate)


def _without_holdout(non_members: NonMembers) -> list[str]:
    """Return a sentence on what a control takes where no holdout was given."""
    if non_members.grade == "holdout":
        return []
    texts = f"the control wrote ({non_members.reason})" if non_members.reason else "were written for this package"
    return [
        f"No holdout was given, and the texts are compared with {len(non_members.tokens)} that {texts}. This holds if "
        "the control knows the forget set's kind as well as the model does, as one retrained without these texts. "
        "Training on texts of a kind makes all of that kind likelier, so a control without it exposes unseen text too."
    ]


def _loaded(model: Any, tokenizer: Any, config: AttackConfig) -> LanguageModel:
    lm = LanguageModel.of(model, tokenizer, workspace=config.workspace)
    if not isinstance(model, LanguageModel) and lm.module is not model:  # loaded here
        to_device(lm.module, default_device())
    return lm


def _in_best_form(
    lm: LanguageModel, examples: dict[str, list[Example]], config: AttackConfig, bar: Progress
) -> RenderedTexts:
    """Return the texts in the rendering that `template` says, chosen here where it is auto; log an example."""
    texts = render(lm, examples, config.template, truncate=config.truncate)
    if config.template == "auto" and texts.name is not None:
        bar.say("comparing forms of the records")
        with evaluation_mode(lm.module):
            score = Scorer(lm, 4 * config.batch_size).token_log_likelihood
            texts = likeliest(lm, texts, score, truncate=config.truncate)
    if line := texts.example_line(lm, change=str if config.show_text else masked):
        logger.info(line)
    return texts


def _non_members(
    lm: LanguageModel, control: LanguageModel | None, rendered: RenderedTexts, config: AttackConfig, bar: Progress
) -> tuple[NonMembers, list[Example] | None]:
    """Return the non-members, and the same as examples, or None where they exist as tokens alone."""
    forget, tokens = rendered.examples["forget"], rendered.tokens
    if "holdout" in tokens:
        return non_members_of_holdout(len(forget), tokens["holdout"]), rendered.examples["holdout"]
    bar.say("scoring unseen text")
    reader = lm if control is None else control
    with evaluation_mode(reader.module):
        chosen = non_members_without_holdout(
            reader,
            forget,
            tokens["forget"],
            chat_template=rendered.rendering.chat_template,
            is_reference=control is not None,
            seed=config.seed,
            batch_size=4 * config.batch_size,
        )
    return chosen, None if chosen.reason else list(unseen_like(forget))


def _groups(rendered: RenderedTexts, role: str, indices: Sequence[int]) -> list[int]:
    """Return a number for each of a role's texts, the same for windows of one record and for near copies."""
    first = {i: group[0] for group in groups_of_copies(rendered.given[role]) for i in group}
    records = [int(rendered.encoded.records[role][i]) for i in indices]
    return [first.get(record, record) for record in records]


def _unrendered(rendered: RenderedTexts, forget: Sequence[int], holdout: Sequence[int]) -> list[Example | None]:
    """Return the texts as they were read, None for a window of a longer record; none without a holdout."""
    if "holdout" not in rendered.given:
        return []
    examples: list[Example | None] = []
    for role, indices in {"forget": forget, "holdout": holdout}.items():
        records = rendered.encoded.records[role]
        windows = np.bincount(records)
        examples += [rendered.given[role][records[i]] if windows[records[i]] == 1 else None for i in indices]
    return examples


def _drawn(rng: np.random.Generator, n: int, most: int) -> list[int]:
    """Return at most that many of n indices, in order, drawn at random."""
    return list(range(n)) if n <= most else sorted(rng.permutation(n)[:most].tolist())
