"""Attacks on the result of a run: those that the settings name, and the records in two other forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from pyunlearn.attacks import AttackConfig, AttackResult
from pyunlearn.attacks.api import attacked
from pyunlearn.attacks.config import DEFAULT
from pyunlearn.attacks.judge import non_members_for
from pyunlearn.attacks.prepare import arranged
from pyunlearn.attacks.renderings import in_forms
from pyunlearn.attacks.target import Target, Trial, Unsuited
from pyunlearn.data.rendering import other_renderings
from pyunlearn.errors import PyunlearnError
from pyunlearn.metrics import generalized_exposure
from pyunlearn.metrics.exposure import is_significant
from pyunlearn.metrics.families import stands_out
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.probes.renderings import RECORDS, RenderedTexts
from pyunlearn.progress import Progress, logger
from pyunlearn.unlearning.checkpoint import Checkpoint
from pyunlearn.unlearning.config import UnlearnConfig
from pyunlearn.unlearning.result import Result
from pyunlearn.unlearning.setup import Session

_FORMS = ("chat", "plain", "joined")
"""Forms that differ most, in order of preference: two that are not the run's are tried."""


class KnownForm(NamedTuple):
    """A form in which records stand out among unseen ones."""

    pvalue: float
    """Chance that as many of a set of unseen records stand out, adjusted for the number of forms."""
    form: str
    returned: int
    """Records with an exposure of 4.32 bits or more."""
    tested: int


def try_attacks(
    result: Result, session: Session, texts: RenderedTexts, config: UnlearnConfig, bar: Progress, checkpoint: Checkpoint
) -> None:
    """Add the attacks that the settings name to a result, and a note where its records stand out in another form."""
    processes, written, target = session.processes, texts.as_written, session.scorer.lm
    if processes.count > 1 or result.model is not target.module:  # wrapped for several processes, or merged
        target = LanguageModel.described(result.model, target.tokenizer, workspace=config.workspace)
    if config.attacks is not None:
        result.attack = processes.once(lambda: _attacked(target, written, config, bar, checkpoint))
    if _may_be_known_otherwise(result, texts, config) and not processes.sharded:
        may_be_robust = not config.robust and session.forget_term.method.kind != "hidden"
        result.notes += processes.once(lambda: _other_forms(target, written, config, bar, may_be_robust=may_be_robust))


def _attacked(
    target: LanguageModel, texts: RenderedTexts, config: UnlearnConfig, bar: Progress, checkpoint: Checkpoint
) -> AttackResult:
    """Try the attacks that the settings name; the checkpoint stays if they cannot be tried."""
    attacks = _attack_config(config, config.attacks or DEFAULT)
    try:
        return attacked(arranged(target, texts, attacks, bar), attacks, bar)
    except BaseException:
        if checkpoint.exists:
            logger.warning(f"{checkpoint.path} holds the run: resume=True (--resume) saves it, also without attacks")
        raise


def _attack_config(config: UnlearnConfig, attacks: Sequence[str]) -> AttackConfig:
    """Return the settings of attacks with those of the run."""
    return AttackConfig(
        attacks=tuple(attacks),
        false_discovery_rate=config.false_discovery_rate,
        batch_size=config.micro_batch_size or config.batch_size,
        workspace=config.workspace,
        seed=config.seed,
    )


def _may_be_known_otherwise(result: Result, texts: RenderedTexts, config: UnlearnConfig) -> bool:
    """Return whether memorized records have a prompt, so another form, a holdout compares, and no attack tries it."""
    holdout = texts.as_written.tokens.get("holdout", [])
    return (
        texts.name is not None
        and len(holdout) >= non_members_for(config.false_discovery_rate)
        and any(e.verdict != "not memorized" for e in result.examples)
        and (config.attacks is None or "rendering" not in _attack_config(config, config.attacks).chosen)
    )


def _other_forms(
    target: LanguageModel, texts: RenderedTexts, config: UnlearnConfig, bar: Progress, *, may_be_robust: bool
) -> list[str]:
    """Return a sentence where the records stand out in another form among the holdout's in the same form."""
    settings = _attack_config(config, ("rendering",))
    settings = replace(settings, texts=RECORDS, batch_size=max(1, settings.batch_size // 4))  # the run has more
    most = max(Target.FEWEST, non_members_for(config.false_discovery_rate))
    others = {form.key: form for form in other_renderings(target.tokenizer)}
    forms = [others[key] for key in _FORMS if key in others and key != texts.rendering.key][:2]
    try:
        inputs = arranged(target, texts, settings, bar, most=most)
        trials = list(in_forms(Target(target, inputs.texts, settings, bar), forms))
    except Unsuited:
        return []
    except (PyunlearnError, torch.OutOfMemoryError) as error:  # the run is finished, and this is a note
        return [f"The records were not read in another form: {error}."]
    names = {f"rendering, {form.key}": form.name for form in forms}
    known = standing_out(
        {names[trial.name]: trial for trial in trials}, inputs.texts.groups, config.false_discovery_rate, config.seed
    )
    if known is None:
        return []
    unseen = known.tested / 20
    who = f"{known.returned} of {known.tested} records stand out, where {unseen:.2g} unseen ones would"
    if known.returned <= unseen:
        who = f"the {known.tested} records as a set are likelier than unseen ones"
    mend = "robust=True (--robust) leaves fewer, and " if may_be_robust else ""
    if config.template != "auto":
        mend = "without `template` the run takes the form that the model knows best, and "
    return [
        f"The verdicts are on records in the form {texts.name}. In another one, {known.form}, {who} (p = "
        f"{known.pvalue:.1g}): {mend}`pyunlearn attack --attacks rendering` tries every form."
    ]


def standing_out(trials: Mapping[str, Trial], groups: Sequence[int], rate: float, seed: int) -> KnownForm | None:
    """Return the form in which a set of records stands out most, if one does; of unseen sets at most `rate` do.

    Args:
        trials: name of a form -> scores of n records and of non-members in it.
        groups: (n,) a number for each record, the same for near copies, of which the first counts.
        rate: level of the test over all forms together (Bonferroni).
        seed: of the test's draws.
    """
    forms = []
    for name, trial in trials.items():
        tested = np.flatnonzero(~np.isnan(trial.forget))
        first = tested[np.unique(np.asarray(groups)[tested], return_index=True)[1]]
        if not first.size:
            continue
        bits = generalized_exposure(trial.forget[first], trial.non_members[~np.isnan(trial.non_members)]).lower
        pvalue = min(1.0, stands_out(bits, trial.compared, seed) * len(trials))
        forms.append(KnownForm(pvalue, name, int(is_significant(bits).sum()), bits.size))
    most = min(forms, default=None)
    return most if most is not None and most.pvalue <= rate else None
