"""The worked example of docs/contributing/add-an-attack.md: its code runs, and the registry takes its row."""

import re
from pathlib import Path

import torch
from test_attacks import unchanged, weights

from pyunlearn.attacks import ATTACKS, NAMES, AttackConfig
from pyunlearn.attacks.prepare import prepare
from pyunlearn.attacks.registry import Attack
from pyunlearn.attacks.target import Target
from pyunlearn.data import read_examples
from pyunlearn.progress import Progress

DOCUMENT = Path(__file__).parent.parent / "docs" / "contributing" / "add-an-attack.md"


def test_every_attack_has_a_name_a_row_and_a_source():
    """The names of the settings are those of the registry, in the same order."""
    assert tuple(ATTACKS) == NAMES
    page = (DOCUMENT.parent.parent / "attacks.md").read_text(encoding="utf-8")
    for name, attack in ATTACKS.items():
        assert f"| {name} |" in page
        assert "Source:" in (attack.run.__doc__ or "")


def test_the_example_runs_and_restores_the_weights(story):
    """It scores every text in each of its forms."""
    source, row = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    names = {"Attack": Attack}
    exec(compile(source, str(DOCUMENT), "exec"), names)
    attack = eval(row, names)
    config, model = AttackConfig(), story.fresh()
    before = weights(model)
    examples = {role: read_examples(getattr(story, role), role=role) for role in ("forget", "holdout")}
    with Progress(False) as bar:
        models = {"model": model, "control": None, "original": None}
        inputs = prepare(models, story.tokenizer, examples, config, bar)
        trials = list(attack.run(Target(inputs.lm, inputs.texts, config, bar)))
    assert [t.name for t in trials] == ["noise, 1%", "noise, 3%"]
    assert [(len(t.forget), len(t.non_members)) for t in trials] == [(2, 60), (2, 60)]
    assert not torch.equal(torch.tensor(trials[0].forget), torch.tensor(trials[1].forget))
    assert unchanged(before, model)


def test_the_example_is_a_page():
    """The document has ninety lines or fewer, none longer than 120."""
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 90
    assert max(map(len, lines)) <= 120
