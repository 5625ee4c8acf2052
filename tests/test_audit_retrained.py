"""An audit with the original model: a retrained model passes, and what is left in a model is found."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

import pyunlearn
from pyunlearn.auditing.result import UNDECIDED
from pyunlearn.data.copies import near_copies
from pyunlearn.data.overlap import words
from pyunlearn.report import sentences

SECRETS = 40  # that the original was trained on, and the retrained model was not
DRAWS = 30


def model(secrets, seed):
    """A Llama that was trained on 400 records, and often on the secrets, if any."""
    torch.manual_seed(seed)
    tokenizer = tiny.make_tokenizer()
    network = tiny.tiny_llama(len(tokenizer))
    tiny.train(network, tokenizer, tiny.facts(400, 2) + secrets * 10, epochs=8)
    return network, tokenizer


@pytest.fixture(scope="module")
def secrets():
    return tiny.facts(SECRETS, 3)


@pytest.fixture(scope="module")
def original(secrets, one_thread):
    return model(secrets, 0)


@pytest.fixture(scope="module")
def retrained(one_thread):
    return model([], 1)[0]


@pytest.fixture(scope="module")
def unseen():
    """Records that no model was trained on, none of them like another one."""
    rows = tiny.facts(2000, 4)
    documents = [words(f"{row['question']} {row['answer']}") for row in rows]
    alike = {max(pair) for pair in near_copies(documents, documents) if pair[0] != pair[1]}
    return [row for i, row in enumerate(rows) if i not in alike]


def audits(audited, original, secrets, unseen, cache, draws=DRAWS):
    """Yield the audit of 12 of the secrets with 99 non-members, for each draw of both."""
    network, tokenizer = original
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        forget = [secrets[i] for i in rng.choice(len(secrets), 12, replace=False)]
        holdout = [unseen[i] for i in rng.choice(len(unseen), 99, replace=False)]
        yield pyunlearn.audit(
            audited,
            forget,
            holdout=holdout,
            original=network,
            tokenizer=tokenizer,
            metrics=[],
            template="none",
            cache=cache,
            progress=False,
        )


@pytest.mark.full
def test_a_retrained_model_passes(original, retrained, secrets, unseen, tmp_path):
    """In at least 9 of 10 draws, though about 37 % of the secrets lie above the mean of unseen text: undecided."""
    results = list(audits(retrained, original, secrets, unseen, tmp_path))
    assert np.mean([audit.passed for audit in results]) >= 0.9
    undecided, forgotten = (
        np.mean([audit.verdicts.get(name, 0) / 12 for audit in results]) for name in (UNDECIDED, "forgotten")
    )
    assert 0.15 <= undecided <= 0.55
    assert undecided + forgotten >= 0.97


@pytest.mark.full
def test_what_is_left_is_found(original, retrained, secrets, unseen, tmp_path):
    """An untouched model never passes, and all of its secrets are named."""
    untouched = list(audits(original[0], original, secrets, unseen, tmp_path, draws=10))
    assert all(audit.verdicts == {"still exposed": 12} and not audit.passed for audit in untouched)


@pytest.mark.full
@pytest.mark.parametrize(("pvalue", "passes"), [(0.001, False), (0.4, True)])
def test_undecided_texts_pass_where_the_set_is_like_unseen_text(
    original, retrained, secrets, unseen, tmp_path, pvalue, passes
):
    """And not where too many of the set lie high: the headline, its colour and exit code 1 say so."""
    audit = next(audits(retrained, original, secrets, unseen, tmp_path))
    examples = [replace(e, verdict=UNDECIDED) for e in audit.examples]
    audit = replace(audit, examples=examples, top_test=audit.top_test._replace(pvalue=pvalue))
    assert audit.passed == passes
    assert audit.exposed_together == (not passes)
    assert ("all together they do (p = 0.001)" in sentences.headline(audit)) is not passes
    assert sentences.tone(audit) == ("plain" if passes else "warn")
