"""The function `attack`: try to bring back what a model was made to forget, without changing it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyunlearn.attacks.config import QUICK, AttackConfig
from pyunlearn.attacks.judge import BACK, EXPOSED, STAYS, UNTESTED, Judged, judge, returned
from pyunlearn.attacks.prepare import Prepared, notes_of, prepare
from pyunlearn.attacks.registry import ATTACKS
from pyunlearn.attacks.result import AttackedExample, AttackResult, TrialSummary
from pyunlearn.attacks.target import Floats, Target, Trial, Unsuited
from pyunlearn.data import Tokens, check_texts, read_roles
from pyunlearn.errors import ModelError
from pyunlearn.metrics.exposure import is_significant
from pyunlearn.models.condition import weights_of
from pyunlearn.models.language_model import require_model, require_tokenizer
from pyunlearn.options import Flag, accepts, require
from pyunlearn.output import model_name, versions
from pyunlearn.probes.non_members import NO_LIKELIER
from pyunlearn.progress import Progress

AS_IT_IS = "without an attack"
_SAME = 0.01  # nats a token: models that differ by less on every text are the same


@accepts(AttackConfig)
def attack(
    model: Any,
    forget: Any,
    *,
    retain: Any = None,
    holdout: Any = None,
    control: Any = None,
    original: Any = None,
    tokenizer: Any = None,
    config: AttackConfig | str | Path | None = None,
    progress: bool | None = None,
    **settings: Any,
) -> AttackResult:
    """Try to bring forget texts back into a model that was made to forget them: a verdict for each.

    Each attack is tried in one or several forms: the rest of a text after its beginning, weights rounded to 4 bits,
    fine-tuning on other text, and more (`attacks`). Under every one of them the forget texts are compared with
    text that was never trained on and suffers the same attack, so that "comes back" means more than the attack does to
    any text. At most `false_discovery_rate` of the texts said to come back are unseen ones, on average, however many
    attacks are tried (`pyunlearn.metrics.recovery`). The model is not changed: its weights are restored bit for bit.

    A text that *stays forgotten* is one that these attacks did not bring back. Others might.

    Args:
        model: a transformers causal or encoder-decoder language model, or a path, a .gguf file or a name to load from.
        forget: the texts in question: a text, a list of texts or dicts, a datasets.Dataset, or a path.
        retain: text that must keep working, same forms: an attacker's fine-tuning data, and examples to prime with.
        holdout: text of the forget set's kind that was never trained on, same forms, 39 different texts or more.
            Default: as in `audit`, and then relearning needs a control.
        control: a model that never saw the forget texts, best one retrained without them, same forms as `model`: it is
            attacked in the same way, and each score is the model's less the control's.
        original: the model before unlearning, same forms: for the attack merging, and for rendering and paraphrase
            to tell in which forms it knew the texts.
        tokenizer: the model's, or where it is. Default: where the model came from.
        config: an AttackConfig, or a TOML file or attack.json to read one from; keywords change single settings of it.
        progress: a progress bar on standard error. Default: where that is a terminal.
        {options}

    Returns:
        AttackResult: `.passed`, `.headline`, `.examples` (a verdict each), `.trials` (every form of attack), `.notes`,
        `.to_dict()`.

    Raises:
        ArgumentError, DataError, ModelError: an argument that cannot be used.

    Source: of each attack in docs/attacks.md; the comparison with unseen text under the same attack is ours.
    """
    began = time.perf_counter()
    config = AttackConfig.of(config, settings, "attack")
    models = {"model": model, "control": control, "original": original}
    for look_up in (False, True):
        for name, each in models.items():
            if each is not None or name == "model":
                require_model(name, each, look_up=look_up)
    require_tokenizer("tokenizer", tokenizer)
    if progress is not None:
        require(Flag(), progress=progress)
    examples, drawn = read_roles({"forget": forget, "retain": retain, "holdout": holdout}, turns=config.turns)
    examples, notes = check_texts(examples)
    with Progress(progress, "attacking") as bar:
        inputs = prepare(models, tokenizer, examples, config, bar)
        result = attacked(inputs, config, bar)
    result.settings |= {name: model_name(each) for name, each in models.items()}
    result.notes = drawn + notes + result.notes
    result.seconds = time.perf_counter() - began
    return result


def attacked(
    inputs: Prepared, config: AttackConfig, bar: Progress, read: Mapping[Tokens, Floats] | None = None
) -> AttackResult:
    """Try every attack on prepared inputs, and judge the texts; the weights are restored bit for bit.

    `read`: text -> log-likelihoods of its scored tokens, of texts that the model has read already.
    """
    began = time.perf_counter()
    target = Target(inputs.lm, inputs.texts, config, bar, inputs.original, read=read or {})
    against: list[Trial] = []
    with torch.inference_mode(False):
        if inputs.control is not None:
            control = Target(inputs.control, inputs.texts, config, bar, inputs.original, target.chosen)
            _require_another(target.nll(inputs.texts.forget) - control.nll(inputs.texts.forget))
        trials, left_out = _tried(target)
        if inputs.control is not None:
            against, not_on_control = _tried(control)
            left_out += [note for note in not_on_control if note not in left_out]
    compared = [_compared(t, against, inputs) for t in trials]
    trials = [replace(t, judged=c.judged) for t, c in zip(trials, compared, strict=True)]
    left_out += _unjudged(trials, has_control=bool(against))
    left_out += _quick_forms(trials, config)
    judged = judge(compared, config, inputs.texts.groups)
    named = [name in (EXPOSED, BACK) for name in judged.verdict]
    return AttackResult(
        examples=_examples(inputs, judged, trials),
        trials=[_summary(t, judged.exposure[k], judged.set_pvalue[k], against) for k, t in enumerate(trials)],
        non_members=inputs.non_members.grade,
        non_member_count=len(inputs.texts.non_members),
        pvalue=judged.pvalue,
        false_discovery_rate=config.false_discovery_rate,
        seconds=time.perf_counter() - began,
        settings=versions() | config.to_dict() | {"weights": weights_of(inputs.lm.module)},
        notes=left_out + target.notes + notes_of(inputs, judged.verdict, named, compared, config.false_discovery_rate),
    )


def _tried(target: Target) -> tuple[list[Trial], list[str]]:
    """Return the trials of every chosen attack, after one without an attack; and which attacks were left out."""
    target.bar.begin("reading the texts", len(target.texts.every))
    trials, left_out = [_as_it_is(target)], []
    if not np.isfinite(trials[0].forget).all() or trials[0].forget.max() >= Target.DESTROYED:
        raise ModelError("the model gives text NaN or Inf as log-likelihood: its weights are broken")
    for name in target.config.chosen:
        try:
            trials += [replace(t, attack=name) for t in ATTACKS[name].run(target)]
        except (Unsuited, ModelError, torch.OutOfMemoryError) as error:
            reason = "the memory is too small for it (relearning_lora takes less)"
            if not isinstance(error, torch.OutOfMemoryError):
                reason = str(error)
            left_out.append(f"The attack {name} was left out: {reason}.")
    return trials, left_out


def _as_it_is(target: Target) -> Trial:
    """Return the scores without an attack: the means of the tokens' log-likelihoods, which `prefix` reads too."""
    nll, n = target.finite(np.array([-x.mean() for x in target.as_it_is])), len(target.texts.forget)
    return Trial(AS_IT_IS, nll[:n], nll[n:])


def _require_another(difference: Floats) -> None:
    """Raise ModelError where the control gives each forget text the model's own log-likelihood."""
    if np.abs(difference).max() < _SAME:
        raise ModelError(
            "control gives each forget text the log-likelihood that the model gives it, as if it were the same model: "
            "give one that never saw the forget texts, best one retrained without them"
        )


def _compared(trial: Trial, against: list[Trial], inputs: Prepared) -> Trial:
    """Return a trial with scores less the control's under the same attack, or less what is expected of unseen text."""
    whole = not trial.attack or ATTACKS[trial.attack].whole
    if not against and not whole:  # what is expected of unseen text is known for the whole text as it is
        return replace(trial, judged=trial.judged and inputs.texts.same_kind)
    if not against:
        forget, own = inputs.expected
        return replace(trial, forget=trial.forget - forget.nll, non_members=trial.non_members - own.nll)
    same = next((t for t in against if t.name == trial.name), against[0] if trial.attack == "adapter" else None)
    if same is None:
        return replace(trial, judged=False)
    return replace(
        trial,
        forget=trial.forget - same.forget,
        non_members=trial.non_members - same.non_members,
        judged=True,
    )


def _unjudged(trials: list[Trial], *, has_control: bool) -> list[str]:
    """Return a sentence on the attacks that were tried and count for no verdict."""
    names = dict.fromkeys(t.attack for t in trials if not t.judged)
    if not names:
        return []
    why = "the control could not be attacked in the same way" if has_control else "that takes a control"
    if not has_control and set(names) != {"merging"}:
        why = "that takes a holdout or a control"
    return [f"Tried, but not judged: {', '.join(names)}; {why}."]


def _quick_forms(trials: list[Trial], config: AttackConfig) -> list[str]:
    """Return a sentence on the attacks that were tried in their quick forms, with fewer of the non-members."""
    quick = [t for t in trials if t.attack in QUICK and config.is_quick(t.attack)]
    if not quick:
        return []
    m, few = len(quick[0].non_members), min(t.compared for t in quick)
    among = f", compared with {few} of {m} non-members" if few < m else ""
    names = ", ".join(dict.fromkeys(t.attack for t in quick))
    return [f"Tried in a quick form{among}: {names}; by these names, or all (--attacks), they are thorough."]


def _examples(inputs: Prepared, judged: Judged, trials: list[Trial]) -> list[AttackedExample]:
    """Return every forget text, those that were not attacked as untested."""
    positions = {index: i for i, index in enumerate(inputs.indices)}
    strongest_claim = NO_LIKELIER if inputs.non_members.grade == "self-sampled" else STAYS
    examples = []
    for index, e in enumerate(inputs.rendered.examples["forget"]):
        i = positions.get(index)
        verdict = UNTESTED if i is None else judged.verdict[i]
        own = [] if i is None or verdict != BACK else returned(judged, i)
        k = -1 if i is None else int(judged.strongest[i])
        bits = [None if i is None or np.isnan(row[i]) else float(row[i]) for row in judged.exposure]
        examples.append(
            AttackedExample(
                index=index,
                prompt=e.prompt if e.prompted else "",
                text=e.scored_text,
                tokens=len(inputs.rendered.tokens["forget"][index].scored),
                verdict=strongest_claim if verdict == STAYS else verdict,
                attacks=tuple(trials[j].name for j in own),
                strongest=None if k < 0 else trials[k].name,
                exposure=None if k < 0 else bits[k],
                interval=None if i is None else judged.interval[i],
                combined_exposure=None if i is None else float(judged.combined[i]),
                exposures={t.name: b for t, b in zip(trials, bits, strict=True)},
                **inputs.rendered.encoded.parts[index]._asdict(),
            )
        )
    return examples


def _summary(trial: Trial, exposure: Floats, set_pvalue: float, against: list[Trial]) -> TrialSummary:
    """Return the numbers of a trial over the whole set."""
    writes = bool(trial.attack) and ATTACKS[trial.attack].writes
    control = None if writes else next((t for t in against if t.name == trial.name), None)
    tested = ~np.isnan(trial.forget)
    return TrialSummary(
        name=trial.name,
        attack=trial.attack,
        judged=trial.judged,
        tested=int(tested.sum()),
        returned=int(is_significant(exposure[tested]).sum()),
        set_pvalue=None if np.isnan(set_pvalue) else float(set_pvalue),
        log_likelihood=None if writes else _mean(-trial.forget),
        non_member_log_likelihood=None if writes else _mean(-trial.non_members),
        control_log_likelihood=None if control is None else _mean(-control.forget),
        details=trial.details,
    )


def _mean(values: Floats) -> float | None:
    """Return the mean of the numbers that are there, or None."""
    return float(np.nanmean(values)) if (~np.isnan(values)).any() else None
