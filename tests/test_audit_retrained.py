"""An audit with the original model: a retrained model passes, and what is left in a model is found."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

import pyunlearn
from pyunlearn.auditing.assemble import AuditAssembler
from pyunlearn.auditing.config import AuditConfig
from pyunlearn.auditing.result import UNDECIDED, RetainUtility
from pyunlearn.metrics import Interval, PairedDifference
from pyunlearn.probes.non_members import uncalibrated
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
    return tiny.distinct_facts(2000, 4)


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
def test_texts_that_were_learned_later_are_found(original, retrained, secrets, unseen, tmp_path):
    """With a model as the original that never saw them; a model that never saw them either passes."""
    learned = list(audits(original[0], (retrained, original[1]), secrets, unseen, tmp_path, draws=5))
    assert all(audit.verdicts == {"still exposed": 12} and not audit.passed for audit in learned)
    assert all("12 texts stand out, and not under the original model" in " ".join(a.notes) for a in learned)
    assert all("Before unlearning, 0 of 12 stood out as memorized" in sentences.summary(a)[0] for a in learned)
    another = audits(model([], 2)[0], (retrained, original[1]), secrets, unseen, tmp_path)
    assert np.mean([audit.passed for audit in another]) >= 0.9


@pytest.mark.full
def test_what_is_left_is_found(original, retrained, secrets, unseen, tmp_path):
    """An untouched model never passes, and all of its secrets are named; nor one that knows a single one of them."""
    untouched = list(audits(original[0], original, secrets, unseen, tmp_path, draws=5))
    assert all(audit.verdicts == {"still exposed": 12} and not audit.passed for audit in untouched)
    knows_one, _ = model(secrets[:1] * 3, 2)
    known = [
        (e.verdict, audit.passed)
        for audit in audits(knows_one, original, secrets, unseen, tmp_path)
        for e in audit.examples
        if e.text.strip() == secrets[0]["answer"]
    ]
    assert len(known) >= 5
    assert set(known) == {("still exposed", False)}


def responses(forget, non_members):
    """What a model answers, of which the audit takes the mean negative log-likelihoods, nats a token."""
    statistics = {
        role: SimpleNamespace(mean_log_likelihood=-nll, greedy_match=np.full(len(nll), 0.3))
        for role, nll in {"forget": forget, "non_members": non_members}.items()
    }
    return SimpleNamespace(statistics=statistics, continuations={})


def judged(shift, depth, *, n=12, m=99, spread=0.15, seed=0):
    """The verdicts and p-value of n texts, 4 spreads below unseen text before and `depth` now.

    All unseen text has become less likely by the share `shift`, of 3 nats; a depth of 0 is a retrained model.
    """
    rng = np.random.default_rng(seed)
    unseen = 3 + spread * rng.standard_normal(m)
    texts = 3 * (1 + shift) + spread * (rng.standard_normal(n) * (0.1 if depth else 1) - depth)

    sides = uncalibrated("holdout", n, [], m=m)
    texts_of_audit = SimpleNamespace(
        non_members=sides, openings=[], holdout=[], as_they_are=[*range(n)], forms=[""] * n
    )
    before = responses(np.full(n, 3 - 4 * spread), unseen)
    now = responses(texts, unseen + 3 * shift)
    assembler = AuditAssembler(texts_of_audit, None, AuditConfig(), now, before)
    assembler.recited = np.zeros(n, dtype=bool)
    return set(assembler._verdict().verdict), assembler.left.pvalue


@pytest.mark.parametrize("shift", [-0.12, -0.05, 0.0, 0.05, 0.09])
def test_a_model_that_is_a_little_better_or_worse_is_judged_by_its_own_unseen_text(shift):
    """A retrained one has no text that is exposed or over-unlearned; texts that were left are exposed, all the same."""
    retrained = [judged(shift, 0, seed=seed) for seed in range(20)]
    wrong = [verdicts & {"still exposed", "over-unlearned"} or p < 0.05 for verdicts, p in retrained]
    assert sum(map(bool, wrong)) <= 4
    assert all(judged(shift, 2.6, seed=seed)[0] == {"still exposed"} for seed in range(10))


def test_a_model_that_finds_all_text_unlikely_has_forgotten_nothing_in_particular():
    """From a loss of 10 % on: what is as unlikely as its other text is over-unlearned, not forgotten."""
    assert judged(0.2, 0)[0] == {"over-unlearned"}


@pytest.mark.full
@pytest.mark.parametrize(("pvalue", "passes"), [(0.001, False), (0.4, True)])
def test_undecided_texts_pass_where_the_set_is_like_unseen_text(
    original, retrained, secrets, unseen, tmp_path, pvalue, passes
):
    """And not where too many of the set lie high: the headline and its colour say so."""
    audit = next(audits(retrained, original, secrets, unseen, tmp_path))
    examples = [replace(e, verdict=UNDECIDED) for e in audit.examples]
    audit = replace(audit, examples=examples, left_pvalue=pvalue)
    assert audit.passed == passes
    assert audit.exposed_together == (not passes)
    assert ("all together they do (p = 0.001)" in sentences.headline(audit)) is not passes
    assert sentences.tone(audit) == ("plain" if passes else "warn")


@pytest.mark.full
def test_an_audit_warns_of_what_was_lost(original, retrained, secrets, unseen, tmp_path):
    """Where the retain set has become less likely by more than 5 % of its nats, or of one, for certain."""
    audit = next(audits(retrained, original, secrets, unseen, tmp_path))
    audit = replace(audit, examples=[replace(e, verdict="forgotten") for e in audit.examples])
    for low, before, lost in ((0.06, 0.5, True), (0.04, 0.5, False), (0.06, 2.0, False), (0.11, 2.0, True)):
        change = PairedDifference(0.2, low, 0.3, 0.001, 0.001)
        utility = RetainUtility(40, Interval(before + 0.2, 0.0, 9.0), Interval(before, 0.0, 9.0), change)
        told = replace(audit, utility=utility)
        assert told.utility_lost == lost
        assert ("text that must keep working was lost" in " ".join(sentences.summary(told))) == lost
        assert sentences.tone(told) == ("plain" if lost else "good")
    assert not audit.utility_lost
