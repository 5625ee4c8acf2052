"""Verdicts by a reference model: what stands out beyond it, with a holdout and without one."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from unlearning_runs import Interrupted, same, timeless

import pyunlearn
from pyunlearn.data import Tokens, encode, read_examples
from pyunlearn.errors import DataError, ModelError
from pyunlearn.methods import METHODS
from pyunlearn.metrics import NULL_MEAN, SIGNIFICANT, generalized_exposure
from pyunlearn.models import LanguageModel, Scorer
from pyunlearn.probes.calibration import Expected
from pyunlearn.probes.non_members import (
    calibrated,
    evidence_notes,
    non_members_of_holdout,
    reference_numbers,
    uncalibrated,
)
from pyunlearn.unlearning.reference import reference_on_device
from pyunlearn.unlearning.stopping import StoppingRule

pytestmark = pytest.mark.usefixtures("one_thread")

SECRETS_EXPOSED = ["still exposed"] * 2 + ["not memorized"] * 2


def fine_tuned(trained, rows):
    """A base model that knows texts like `rows`, fine-tuned with two secrets (12 times each) and without them."""
    forget, retain = rows(2, 33), rows(60, 32)
    model, retrained = trained.fresh(), trained.fresh()
    tiny.train(model, trained.tokenizer, retain + forget * 12, epochs=6, learning_rate=2e-3)
    tiny.train(retrained, trained.tokenizer, retain, epochs=6, learning_rate=2e-3)
    torch.manual_seed(0)
    start = type(model)(model.config).eval()
    return SimpleNamespace(
        model=model,
        references={"retrained": retrained, "base": trained.model, "start": start},
        tokenizer=trained.tokenizer,
        forget=forget + rows(2, 14),
        retain=retain,
        holdout=rows(60, 6),
    )


@pytest.fixture(scope="module")
def plain(story):
    """Models of sentences."""
    return fine_tuned(story, tiny.sentences)


@pytest.fixture(scope="module", params=["plain", pytest.param("prompts", marks=pytest.mark.full)])
def tuned(request):
    """Models of sentences, and of questions and answers."""
    if request.param == "plain":
        return request.getfixturevalue("plain")
    return fine_tuned(request.getfixturevalue("answers"), tiny.facts)


def audit(tuned, reference, *, forget=None, holdout=None, **options):
    """Audit the fine-tuned model; `reference` is the name of one of its references, or a model."""
    options = {"tokenizer": tuned.tokenizer, "metrics": [], "progress": False, **options}
    reference = tuned.references.get(reference, reference) if isinstance(reference, str) else reference
    forget = tuned.forget if forget is None else forget
    return pyunlearn.audit(tuned.model, forget, holdout=holdout, reference_model=reference, **options)


def unlearn(tuned, reference, *, model=None, **options):
    """Unlearn from a copy of the fine-tuned model."""
    options = {"retain": tuned.retain, "learning_rate": 1e-3, "progress": False, **options}
    reference = tuned.references.get(reference, reference) if isinstance(reference, str) else reference
    model = copy.deepcopy(tuned.model) if model is None else model
    return pyunlearn.unlearn(model, tuned.forget, tokenizer=tuned.tokenizer, reference_model=reference, **options)


# ---------------------------------------------------------------- what is found


@pytest.mark.parametrize("reference", ["retrained", "base"])
def test_secrets_stand_out_beyond_a_model_that_never_saw_them(tuned, reference):
    """Among a holdout and among texts that the reference model wrote; unseen texts of the same kind do not."""
    with_holdout = audit(tuned, reference, holdout=tuned.holdout)
    without = audit(tuned, reference)
    for found, grade in ((with_holdout, "holdout"), (without, "reference model")):
        assert [e.verdict for e in found.examples] == SECRETS_EXPOSED
        assert found.non_members.source == grade
        assert min(e.exposure for e in found.examples[:2]) > 5.9
        assert max(e.exposure for e in found.examples[2:]) < SIGNIFICANT
    assert with_holdout.notes[-1].startswith("Each score is less what the reference model gives the same text")
    assert "64 texts that the reference model wrote" in without.notes[-1]
    assert "A holdout is better evidence" in without.notes[-1]


def test_the_exposures_are_those_of_the_difference_to_the_reference_model(plain):
    """Of the holdout as of the forget set, from plain logits."""
    found = audit(plain, "base", holdout=plain.holdout)
    texts, holdout = (
        tiny.negative_log_likelihoods(plain, rows, plain.model)
        - tiny.negative_log_likelihoods(plain, rows, plain.references["base"])
        for rows in (plain.forget, plain.holdout)
    )
    np.testing.assert_allclose(found.non_members.scores, holdout, atol=1e-4)
    by_hand = np.log2(61 / (1 + (holdout[:, None] <= texts).sum(axis=0)))
    np.testing.assert_allclose([e.exposure for e in found.examples], by_hand, atol=1e-6)


def test_first_choice_tokens_are_counted_beyond_the_reference_model(plain):
    """Its shares, and not the model's, are what is expected of unseen text; a run ends by what exceeds them."""
    lm, base = (LanguageModel.of(model, plain.tokenizer) for model in (plain.model, plain.references["base"]))
    forget, holdout = (
        encode(read_examples(rows, role="x"), plain.tokenizer, role="x", max_length=None)
        for rows in (plain.forget, plain.holdout)
    )
    numbers = [reference_numbers(Scorer(lm, 8), base.likelihood, x) for x in (forget, holdout)]
    nll = -Scorer(lm, 8).mean_log_likelihood(forget)
    chosen = calibrated(non_members_of_holdout(4, holdout), nll, *numbers)
    for expected, tokens in ((chosen.forget, forget), (chosen.own, holdout)):
        np.testing.assert_allclose(expected.greedy_match, Scorer(base, 8).greedy_match(tokens), atol=1e-6)
        np.testing.assert_allclose(expected.nll, -Scorer(base, 8).mean_log_likelihood(tokens), atol=1e-5)
    assert (Scorer(lm, 8).greedy_match(forget)[:2] > chosen.forget.greedy_match[:2]).all()
    result = unlearn(plain, "base", holdout=plain.holdout, max_steps=0)
    excess = Scorer(lm, 8).greedy_match(forget) - chosen.forget.greedy_match
    own = Scorer(lm, 8).greedy_match(holdout) - chosen.own.greedy_match
    extraction = generalized_exposure(-excess, -own).lower
    np.testing.assert_allclose([e.extraction_after for e in result.examples], extraction, atol=1e-6)


@pytest.mark.full
def test_unseen_texts_are_no_more_exposed_than_they_should_be(plain):
    """200 of them by a retrained model: a mean near 1.44 bits, and about one in twenty beyond 4.32."""
    exposures = [e.exposure for e in audit(plain, "retrained", forget=tiny.sentences(200, 77)).examples]
    assert 1.2 < np.mean(exposures) < 1.9
    assert np.mean(np.array(exposures) >= SIGNIFICANT) < 0.1


def test_a_reference_model_that_does_not_know_the_kind_needs_a_holdout(plain):
    """Text of a kind that it has never read counts as memorized, as a note says; a holdout is of that kind too."""
    assert [e.verdict for e in audit(plain, "start", holdout=plain.holdout).examples] == SECRETS_EXPOSED
    without = audit(plain, "start")
    assert without.verdicts == {"still exposed": 4}
    assert "so unseen text of that kind may count as memorized" in without.notes[-1]


@pytest.mark.full
def test_false_alarms_are_as_rare_and_memorized_texts_are_found_more_often():
    """Of 20 unseen texts among 60 non-members one or more counts as memorized in at most 5 % of 1000 sets (7 % with
    chance). Of 10 memorized ones, in 1000 other sets, the plain score finds few: it does not know which texts are easy.
    """
    rng, alarms, hits = np.random.default_rng(0), {True: 0, False: 0}, {True: 0, False: 0}
    for k in range(2000):
        easy = rng.gamma(4, 0.5, 80)
        nll, base = (easy + rng.normal(0, 0.2, 80) for _ in range(2))
        memorized = np.arange(20) < (10 if k % 2 else 0)
        nll[:20] -= 1.2 * memorized
        match, base_match = rng.uniform(0, 1, (2, 80))
        holdout = uncalibrated("holdout", 20, [], m=60)
        expected = Expected(base[:20], base_match[:20]), Expected(base[20:], base_match[20:])
        for by_reference in (True, False):
            non_members = calibrated(holdout, nll[:20], *expected) if by_reference else holdout
            rule = StoppingRule(
                -nll[:20],
                nll[20:],
                match[20:],
                nll[20:],
                target_exposure=1.44,
                utility_budget=1,
                non_members=non_members,
            )
            if k % 2:
                hits[by_reference] += rule.memorized[:10].mean() / 1000
            else:
                alarms[by_reference] += rule.memorized.any() / 1000
    assert max(alarms.values()) < 0.07
    assert hits[True] > 0.8 > 0.3 > hits[False]


# ---------------------------------------------------------------- what is forgotten


@pytest.mark.parametrize("holdout", [False, pytest.param(True, marks=pytest.mark.full)])
def test_a_run_ends_forgotten_where_the_reference_model_would_be(plain, holdout):
    """Without a holdout too, by a method that reads no reference model; the secrets end near the retrained model."""
    before = copy.deepcopy(plain.references["retrained"].state_dict())
    # the 12 texts set apart were fine-tuned on as well, and lose what no retain loss protects: 10 % (0 to 20 %)
    result = unlearn(plain, "retrained", holdout=plain.holdout if holdout else None, utility_budget=0.2)
    assert result.stopped == "forgotten"
    assert result.forgotten
    assert result.evidence == result.to_dict()["evidence"] == ("holdout" if holdout else "reference model")
    assert [e.verdict for e in result.examples] == ["forgotten"] * 2 + ["not memorized"] * 2
    assert max(e.exposure_after for e in result.examples[:2]) <= NULL_MEAN
    right = -tiny.negative_log_likelihoods(plain, plain.forget[:2], plain.references["retrained"])
    np.testing.assert_allclose([e.log_likelihood_after for e in result.examples[:2]], right, atol=0.5)
    assert "less what the reference model gives the same text" in result.notes[-1]
    assert same(before, plain.references["retrained"])


def test_without_a_retain_set_the_utility_is_that_of_the_reference_model_s_texts(plain):
    """The result says on what it was measured; a reference model in training mode is in that again at the end."""
    reference = plain.references["base"].train()
    utility = unlearn(plain, "base", retain=None, max_steps=0).utility
    assert utility.measured_on == "text sampled from the reference model"
    assert all(module.training for module in reference.modules())
    reference.eval()


def test_processes_that_share_the_model_share_its_reference_too(plain, tmp_path):
    """Where it is loaded for the run; a model that is loaded already is the caller's, and stays whole."""
    lm, placed = LanguageModel.of(plain.model, plain.tokenizer), []
    processes = SimpleNamespace(sharded=True, place=lambda module, inner: placed.append(module))
    plain.references["base"].save_pretrained(tmp_path)
    with reference_on_device(lm, str(tmp_path), processes) as reference:
        assert placed == [reference.module]
        assert not any(p.requires_grad for p in reference.module.parameters())
    with reference_on_device(lm, plain.references["base"], processes) as reference:
        assert reference.module is plain.references["base"]
    assert len(placed) == 1


@pytest.mark.full
def test_a_resumed_run_has_the_numbers_of_an_uninterrupted_one(plain, tmp_path, monkeypatch):
    """And is refused with another reference model, or without one."""
    whole = unlearn(plain, "retrained", max_steps=6)
    with monkeypatch.context() as patch:
        patch.setitem(METHODS, "match", tiny.with_loss("match", Interrupted("match", 4)))
        assert unlearn(plain, "retrained", max_steps=6, output_dir=tmp_path / "out").stopped == "interrupted"
    for other in ("base", None):
        with pytest.raises(DataError, match="was made with another model or reference model"):
            unlearn(plain, other, max_steps=6, output_dir=tmp_path / "out", resume=True)
    resumed = unlearn(plain, "retrained", max_steps=6, output_dir=tmp_path / "out", resume=True)
    assert timeless(resumed.history) == timeless(whole.history)
    assert resumed.examples == whole.examples
    assert resumed.non_member_scores == whole.non_member_scores


def test_an_unlearned_model_is_audited_by_the_same_scores(plain, tmp_path):
    """With the original, the non-members are scored under that; the second audit takes them from the cache."""
    options = {"original": plain.model, "cache": tmp_path}
    unlearned = SimpleNamespace(**vars(plain) | {"model": plain.references["base"]})
    first, second = (audit(unlearned, "retrained", **options) for _ in range(2))
    assert [e.verdict for e in first.examples[2:]] == ["not memorized"] * 2
    assert not {e.verdict for e in first.examples[:2]} & {"not memorized", "no likelier"}
    assert first.non_members == second.non_members
    assert [e.exposure for e in first.examples] == [e.exposure for e in second.examples]
    assert first.non_members.scores == audit(plain, "retrained").non_members.scores


@pytest.mark.full
def test_a_comparison_calibrates_every_row(plain):
    """Its numbers are those of an audit; without a retain set the utility is that of the reference model's texts."""
    options = {"tokenizer": plain.tokenizer, "methods": ["ga", "npo"], "max_steps": 2, "learning_rate": 1e-4}
    made = pyunlearn.compare(plain.model, plain.forget, reference_model=plain.references["retrained"], **options)
    assert [row.status for row in made.rows] == ["done", "done"]
    found = audit(plain, "retrained")
    assert made.original.exposures == pytest.approx([e.exposure for e in found.examples])
    assert made.original.verdicts["still exposed"] == 2
    assert made.utility_text == "text sampled from the reference model"
    assert found.notes[-1] in made.notes


# ---------------------------------------------------------------- which reference models cannot serve


def test_the_model_itself_is_no_reference_model(plain):
    """It cancels what is memorized: not used with a holdout, and refused without one."""
    itself = copy.deepcopy(plain.model)
    found = audit(plain, itself, holdout=plain.holdout)
    assert found.examples == audit(plain, None, holdout=plain.holdout).examples
    assert found.notes == [
        "The reference model gives each forget text the log-likelihood that the model gives it, as if it were the same "
        "model, so the verdicts are made without it, by the holdout alone."
    ]
    for call in (audit, unlearn):
        with pytest.raises(ModelError, match=r"as if it were the same model, .*: give one that never saw the forget"):
            call(plain, itself)
    rounded = copy.deepcopy(plain.model).bfloat16()
    with pytest.raises(ModelError, match="as if it were the same model"):
        unlearn(plain, rounded)


def test_a_reference_model_that_gives_nan_or_has_other_tokens_is_refused(plain):
    """In one sentence, before the model is changed."""
    broken = copy.deepcopy(plain.references["base"])
    broken.lm_head.weight.data[7] = float("nan")
    for reference, message in ((broken, "reference_model gives text NaN"), (tiny.tiny_llama(77), "another vocabulary")):
        model = copy.deepcopy(plain.model)
        with pytest.raises(ModelError, match=message):
            unlearn(plain, reference, model=model, holdout=plain.holdout)
        assert same(model, plain.model)


def test_a_holdout_that_the_reference_model_tells_from_the_forget_set_is_noted():
    """Before the sentence that says what was subtracted."""
    rng = np.random.default_rng(0)
    forget, own = (Expected(rng.normal(mean, 0.3, 30), np.zeros(30)) for mean in (2, 3))
    holdout = uncalibrated("holdout", 30, [Tokens((1, 2), 1)] * 30)
    other, subtracted = evidence_notes(calibrated(holdout, forget.nll - 1, forget, own), ["forgotten"] * 30, rate=0.05)
    assert other.startswith("Under the reference model the holdout is ")
    assert subtracted.startswith("Each score is less ")
