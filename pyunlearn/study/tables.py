"""The tables of a study, as CSV and Parquet."""

from __future__ import annotations

from collections.abc import Sequence

from pyunlearn.data.redaction import masked
from pyunlearn.errors import printable
from pyunlearn.study.claims import CLAIMS, Claim, Variant
from pyunlearn.study.config import OUTSIDE
from pyunlearn.study.folder import Row
from pyunlearn.study.outcomes import CRITERIA, Examples, Outcome
from pyunlearn.study.seeds import Inputs


def write_tables(
    inputs: Inputs,
    examples: Examples,
    outcomes: Sequence[Outcome],
    claims: Sequence[Claim],
    variants: Sequence[Variant],
) -> None:
    """Write every table.

    claims       a row for each decision
    contrasts    a row for each decision and seed: the number that its test uses
    sensitivity  a row for each other way to measure a claim
    examples     a row for each forget example
    runs         a row for each run: the step at which it was forgotten by each criterion
    steps        a row for each measurement of a run
    """
    folder = inputs.folder
    folder.table("claims", [decision_row(c) for c in claims])
    per_seed = [
        {"claim": c.name, "kind": c.kind, "seed": seed, "contrast": value}
        for c in claims
        for seed, value in enumerate(c.contrasts)
    ]
    folder.table("contrasts", per_seed)
    folder.table("sensitivity", [v._asdict() for v in variants])
    folder.table("examples", _examples(inputs, examples))
    folder.table("runs", [_run(o) | _forgotten(o) for o in outcomes])
    folder.table("steps", [_run(o) | _step(o, t) for o in outcomes for t in range(len(o.steps))])


def decision_row(claim: Claim) -> Row:
    """Return a decision with its claim and estimand."""
    estimand = CLAIMS[claim.name]
    contrast = estimand.contrast.replace("canaries", "canaries" if claim.kind == OUTSIDE else f"{claim.kind} sets")
    names = {"claim": claim.name, "kind": claim.kind, "text": estimand.claim, "contrast": contrast}
    return names | {"unit": estimand.unit} | claim.decision._asdict()


def _examples(inputs: Inputs, examples: Examples) -> list[Row]:
    owners = inputs.sets.owners()
    change = printable if inputs.config.show_text else masked
    rows = []
    for position, index in enumerate(examples.indices):
        tokens = inputs.sets.tokens[index].scored
        rows.append(
            {
                "example": index,
                **owners[index]._asdict(),
                "tokens": len(tokens),
                "nll_trained": float(examples.nll[examples.owner[position], position]),
                "nll_retrained": float(examples.calibration[position]),
                "difficulty": float(examples.difficulty[position]),
                "memorization": float(examples.memorization[position]),
                "completion": change(inputs.tokenizer.decode(tokens, skip_special_tokens=True)),
            }
        )
    return rows


def _run(o: Outcome) -> Row:
    return {**o.which._asdict(), "rate": o.rate}


def _forgotten(o: Outcome) -> Row:
    row: Row = {"distance_at_start": float(o.distance[0].mean()), "speed_at_start": float(o.speed().mean())}
    for criterion in CRITERIA:
        step, censored = o.forgotten(criterion)
        row |= {f"{criterion}: step": step, f"{criterion}: censored": censored, f"{criterion}: price": o.rise_at(step)}
    return row


def _step(o: Outcome, t: int) -> Row:
    return {
        "step": int(o.steps[t]),
        "nll": float(o.nll[t].mean()),
        "distance_from_retrained": float(o.distance[t].mean()),
        "test_nll_rise": float(o.rise[t]),
    }
