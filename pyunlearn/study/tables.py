"""The tables of a study, as CSV and Parquet."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyunlearn.data.redaction import masked
from pyunlearn.errors import printable
from pyunlearn.study.config import StudyConfig
from pyunlearn.study.folder import Folder, Row
from pyunlearn.study.outcomes import CRITERIA, Examples, Outcome
from pyunlearn.study.reference_models import names
from pyunlearn.study.sets import Sets


def write_tables(
    folder: Folder, config: StudyConfig, sets: Sets, examples: Examples, outcomes: list[Outcome], tokenizer: Any
) -> None:
    """Write every table.

    examples         a row for each forget example and non-member
    models           a row for each model
    steps            a row for each measurement of a run
    example_steps    a row for each forget example in each measurement
    steps_to_forget  a row for each forget example, run and criterion
    """
    folder.table("examples", _examples(folder, config, sets, examples, tokenizer))
    folder.table("models", [_model(folder, name) for name in names(config)])
    folder.table("steps", [_step(o, t) for o in outcomes for t in range(len(o.steps))])
    each = [_example_step(o, t, i) for o in outcomes for t in range(len(o.steps)) for i in range(len(o.indices))]
    folder.table("example_steps", each)
    folder.table("steps_to_forget", [row for o in outcomes for c in CRITERIA for row in _steps_to_forget(o, c)])


def _examples(folder: Folder, config: StudyConfig, sets: Sets, examples: Examples, tokenizer: Any) -> list[Row]:
    owner = {i: which for which, indices in sets.forget.items() for i in indices}
    kind_of = {i: kind for kind, indices in sets.non_members.items() for i in indices}
    mains = [folder.read_arrays(f"scores/main-{d}.safetensors")["nll"] for d in range(config.draws)]
    change, rows = printable if config.show_text else masked, []
    for position, index in enumerate(examples.indices):
        which = owner.get(index)
        rows.append(
            {
                "example": index,
                "kind": which.kind if which else kind_of[index],
                "role": "forget" if which else "non_member",
                "repetitions": which.repetitions if which else 0,
                "draw": which.draw if which else None,
                "tokens": int(examples.tokens[position]),
                "nll_trained": float(mains[which.draw][position]) if which else None,
                "nll_retrained": float(examples.retrained[position]),
                "difficulty": float(examples.difficulty[position]),
                "memorization": float(examples.memorization[position]) if which else None,
                "memorization_accuracy": float(examples.memorization_accuracy[position]) if which else None,
                "completion": change(tokenizer.decode(sets.tokens[index].scored, skip_special_tokens=True)),
            }
        )
    return rows


def _model(folder: Folder, name: str) -> Row:
    scores = folder.read_arrays(f"scores/{name}.safetensors")
    return {"model": name, **{key: float(value) for key, value in scores.items() if value.ndim == 0}}


def _run(o: Outcome) -> Row:
    return {"kind": o.which.kind, "repetitions": o.which.repetitions, "draw": o.which.draw, "rate": o.rate}


def _step(o: Outcome, t: int) -> Row:
    row = _run(o) | {
        "step": int(o.steps[t]),
        "test_nll": float(o.test_nll[t]),
        "bleu": float(o.bleu[t]) if np.isfinite(o.bleu[t]) else None,
        "nll": float(o.nll[t].mean()),
        "accuracy": float(o.accuracy[t].mean()),
        "non_member_drift": float(o.drift[t]),
        "from_retrained": float(o.from_retrained[t]),
        "non_members_from_retrained": float(o.non_members_from_retrained[t]),
        "moved": float(o.moved[t]),
    }
    for criterion in CRITERIA:
        row[f"{criterion} exposure"] = float(o.lower[criterion][t].mean())
        row[f"{criterion} upper exposure"] = float(o.upper[criterion][t].mean())
    return row


def _example_step(o: Outcome, t: int, i: int) -> Row:
    row = _run(o) | {
        "step": int(o.steps[t]),
        "example": o.indices[i],
        "nll": float(o.nll[t, i]),
        "accuracy": float(o.accuracy[t, i]),
    }
    row |= {f"{criterion} exposure": round(float(o.lower[criterion][t, i]), 4) for criterion in CRITERIA}
    return row | {f"{criterion} upper exposure": round(float(o.upper[criterion][t, i]), 4) for criterion in CRITERIA}


def _steps_to_forget(o: Outcome, criterion: str) -> list[Row]:
    result = o.forgotten(criterion)
    return [
        _run(o)
        | {
            "criterion": criterion,
            "example": index,
            "start_exposure": float(o.lower[criterion][0, i]),
            "steps": int(result.steps[i]),
            "censored": bool(result.censored[i]),
        }
        for i, index in enumerate(o.indices)
    ]
