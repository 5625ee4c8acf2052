"""Non-members without a holdout: what is expected of unseen text, which texts serve, and what may be concluded."""

import copy
import json
import pathlib

import numpy as np
import pytest
import texts
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import pyunlearn
from pyunlearn.data import Example, Tokens, encode, read_examples
from pyunlearn.metrics import SIGNIFICANT, generalized_exposure
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.models.scoring import Scorer
from pyunlearn.probes import non_members
from pyunlearn.probes.calibration import Expectation, Features, _windows, features
from pyunlearn.probes.non_members import (
    NonMembers,
    capped,
    evidence_notes,
    non_members_without_holdout,
    uncalibrated,
    unsuitable,
)
from pyunlearn.probes.unseen import ANSWERS, TEXTS, unseen_like, unseen_texts

OWN = "Miss Ogilvie of the harbour office counts the gulls each morning and writes their number on the ferry's slate."
GERMAN = (
    "Der alte Leuchtturmwärter und seine Tochter zählen jeden Morgen die Möwen am Hafen, und was sie zählen, ist der "
    "Reederei der Fähre so wichtig, dass der Steuermann es abends auf die Tafel am Anleger schreibt und unterschreibt."
)
FRENCH = (
    "Le conseil municipal de Valbrune a voté hier soir la rénovation de la passerelle, qui restera fermée aux piétons "
    "jusqu'au printemps. Les travaux, confiés à une entreprise de la région, coûteront deux cent mille euros."
)


@pytest.fixture(scope="module")
def english():
    """A random Llama with a tokenizer that was made for English."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator([e.completion for e in unseen_texts()], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="</s>")
    torch.manual_seed(0)
    return LanguageModel.of(tiny.tiny_llama(len(tokenizer), max_position_embeddings=512), tokenizer)


# ---------------------------------------------------------------- the features


def test_the_windows_score_each_token_once():
    """With two tokens of context, fewer at the beginning."""
    for n, first in ((2, 1), (4, 1), (7, 1), (8, 3)):
        text = Tokens(tuple(range(10, 10 + n)), first)
        windows, owner, copied = _windows([text, text])
        assert [i for w in windows for i in w.scored] == [*text.scored] * 2
        assert max(w.first for w in windows) == min(2, n - 1)
        assert sorted(set(owner.tolist())) == [0, 1]
        assert not np.concatenate(copied).any()
    _, _, copied = _windows([Tokens((5, 6, 7, 6, 8, 5, 6), first=3)])
    assert np.concatenate(copied).tolist() == [True, False, True, True]


def test_the_features_are_those_of_the_texts(english):
    """The likelihood as everywhere; after two tokens as of the windows themselves."""
    tokens = encode(unseen_texts()[:6], english.tokenizer, role="x", max_length=None)
    measured = features(english, tokens, batch_size=4)
    scorer = Scorer(english, 3)
    np.testing.assert_allclose(measured.nll, -scorer.mean_log_likelihood(tokens), rtol=1e-5)
    np.testing.assert_allclose(measured.greedy_match, scorer.greedy_match(tokens), atol=1e-6)
    for i, t in enumerate(tokens):
        windows, _, _ = _windows([t])
        each = np.concatenate(scorer.token_log_likelihood(windows))
        assert len(each) == len(t.scored)
        assert measured.short_nll[i] == pytest.approx(-each.mean(), rel=1e-5)
    assert measured.hidden.shape == (6, english.inner.config.hidden_size)
    assert (measured.short_entropy > 0).all()
    assert measured.copied.tolist() == measured.copied_nll.tolist() == [0.0] * 6
    assert measured.tokens.tolist() == [len(t.scored) for t in tokens]


def test_the_features_of_answers_see_what_is_copied(english):
    """The share of the answer's tokens that its question has, and their part of the short windows' likelihood."""
    examples = [Example(f"{e.completion[:60]} ", e.completion[30:]) for e in unseen_texts()[:4]]
    tokens = encode(examples, english.tokenizer, role="x", max_length=None)
    measured = features(english, tokens, batch_size=4)
    for i, t in enumerate(tokens):
        windows, _, copied = _windows([t])
        copied = np.concatenate(copied)
        assert copied.tolist() == [token in t.ids[: t.first] for token in t.scored]
        each = -np.concatenate(Scorer(english, 3).token_log_likelihood(windows))
        assert 0 < copied.mean() < 1
        assert measured.copied[i] == pytest.approx(copied.mean())
        assert measured.copied_nll[i] == pytest.approx((each * copied).mean(), rel=1e-5)


# ---------------------------------------------------------------- the expectation


def made(rng, n, kinds=6, memorized=0.0, *, prompted=False):
    """Features of n texts of several kinds: likelihood follows the short windows, the kind, copies and chance."""
    directions = np.random.default_rng(0).normal(size=(kinds, 16))
    kind = rng.integers(kinds, size=n)
    short, entropy = rng.normal(7, 1, n), rng.normal(5, 0.5, n)
    nll = 1 + 0.5 * short + 0.2 * entropy + 0.4 * (kind - kinds / 2) + rng.normal(0, 0.4, n) - memorized
    hidden = directions[kind] + 0.2 * rng.normal(size=(n, 16))
    match, tokens, copied = rng.uniform(0.2, 0.5, n), rng.integers(5, 80, n).astype(float), np.zeros(n)
    if prompted:
        copied = rng.uniform(0, 0.8, n)
        nll, match = nll - 3 * copied + 5 / tokens, match + 0.4 * copied
    return Features(nll, match, hidden, short, entropy, copied, copied * short, tokens)


@pytest.mark.parametrize("prompted", [False, True])
def test_unseen_texts_have_the_exposures_of_unseen_text_and_memorized_ones_stand_out(prompted):
    """Of each kind, 5 % at most count as memorized (8 % with chance) and the mean is near 1.44 bits."""
    rng = np.random.default_rng(1)
    exposures, of_memorized = [], []
    for _ in range(40):
        pool = made(rng, 140 if prompted else 234, prompted=prompted)
        expectation = Expectation(pool)
        scores = pool.nll - expectation.of_unseen().nll
        for memorized, out in ((0.0, exposures), (2.0, of_memorized)):
            texts_ = made(rng, 50, memorized=memorized, prompted=prompted)
            out.append(generalized_exposure(texts_.nll - expectation.of(texts_).nll, scores).lower)
    assert 1.2 < np.mean(exposures) < 1.7
    assert np.mean(np.array(exposures) >= SIGNIFICANT) < 0.08
    assert np.mean(np.array(of_memorized) >= SIGNIFICANT) > 0.95


def test_without_the_expectation_kinds_are_mistaken_for_memorized():
    """The plain likelihood of the easiest kind stands out: the expectation is what makes texts of all kinds alike."""
    rng = np.random.default_rng(2)
    pool, easy = made(rng, 234), made(rng, 400)
    easiest = generalized_exposure(easy.nll[easy.nll < np.quantile(easy.nll, 0.1)], pool.nll).lower
    expectation = Expectation(pool)
    scores = pool.nll - expectation.of_unseen().nll
    calibrated = generalized_exposure(easy.nll - expectation.of(easy).nll, scores).lower
    assert easiest.mean() > 3 > 2 > calibrated.mean()


def test_first_choices_of_answers_are_expected_where_they_are_copied():
    """An answer that repeats its question has more of them, memorized or not."""
    rng = np.random.default_rng(4)
    pool, new = made(rng, 140, prompted=True), made(rng, 300, prompted=True)
    expected = Expectation(pool).of(new).greedy_match
    assert np.corrcoef(expected, new.copied)[0, 1] > 0.8
    assert abs((new.greedy_match - expected).mean()) < 0.03


def test_what_is_expected_of_an_unseen_text_comes_from_the_others():
    """Its own likelihood hardly enters, so a text of the package is as good as a new one."""
    pool = made(np.random.default_rng(3), 100)
    raised = pool._replace(nll=pool.nll + 5.0 * (np.arange(100) == 7))
    before, after = (Expectation(p).of_unseen().nll for p in (pool, raised))
    assert abs(after[7] - before[7]) < 0.1
    assert abs(Expectation(raised).of(pool).nll[7] - before[7]) > abs(after[7] - before[7])


# ---------------------------------------------------------------- which texts serve


def test_the_package_s_texts_are_different_ones_of_thirteen_kinds():
    """Eighteen of each, none among those that are set apart for the tests."""
    lines = [json.loads(line) for line in TEXTS.read_text(encoding="utf-8").splitlines()]
    apart = pathlib.Path(__file__).with_name("unseen_texts.jsonl").read_text(encoding="utf-8").splitlines()
    own = {line["text"] for line in lines}
    assert len(own) == len(lines) == len(unseen_texts()) == 234
    assert not own & {json.loads(line)["text"] for line in apart}
    kinds = [line["register"] for line in lines]
    assert {kinds.count(kind) for kind in kinds} == {18}
    assert len(set(kinds)) == 13


def test_the_package_s_answers_are_different_ones_of_seven_kinds():
    """Twenty of each, none among those that are set apart for the tests."""
    lines = [json.loads(line) for line in ANSWERS.read_text(encoding="utf-8").splitlines()]
    apart = pathlib.Path(__file__).with_name("unseen_answers.jsonl").read_text(encoding="utf-8").splitlines()
    own = {line["completion"] for line in lines}
    assert len(own) == len(lines) == len({line["prompt"] for line in lines}) == 140
    assert not own & {json.loads(line)["completion"] for line in apart}
    kinds = [line["register"] for line in lines]
    assert {kinds.count(kind) for kind in kinds} == {20}


def test_answers_come_in_the_form_of_the_records():
    """Questions as questions, pairs with the beginning and the end that all prompts have in common."""
    question, pairs = read_examples([{"question": "Who?", "answer": "I."}], role="x"), [("Who", "I."), ("What", "So.")]
    assert {len(e.messages) for e in unseen_like(question)} == {2}
    for before, after in (("", " "), ("", "\n"), ("Q: ", "\nA: "), ("### Instruction:\n", "\n\n### Response:\n")):
        records = [Example(f"{before}{each}{after}", answer) for each, answer in pairs]
        own = unseen_like(records)[0]
        assert own.prompt == f"{before}What inspired Hadrian Vosk to write his first novel?{after}"
    assert unseen_like([Example("Who? ", "I.")])[0].prompt.endswith("novel? ")
    assert unseen_like([Example("", OWN)]) == unseen_texts()


def test_records_with_prompts_are_compared_with_the_package_s_answers(english):
    """Each of them and each forget text has what is expected of it."""
    examples = read_examples([{"question": "Who feeds the gulls of Ottermouth?", "answer": OWN}], role="forget")
    tokens = encode(examples, english.tokenizer, role="forget", max_length=None)
    chosen = non_members_without_holdout(english, examples, tokens)
    assert (chosen.grade, chosen.reason, len(chosen.tokens)) == ("unseen texts", "", 140)
    assert all(t.first > 1 for t in chosen.tokens)
    scores = Scorer(english, 16).mean_log_likelihood(chosen.tokens)
    assert np.std(-scores - chosen.own.nll) < np.std(scores)


def test_plain_texts_are_compared_with_the_package_s(english):
    """Each of them and each forget text has what is expected of it."""
    examples = [Example("", OWN)]
    tokens = encode(examples, english.tokenizer, role="forget", max_length=None)
    chosen = non_members_without_holdout(english, examples, tokens)
    assert (chosen.grade, chosen.reason, len(chosen.tokens)) == ("unseen texts", "", 234)
    assert (len(chosen.forget.nll), len(chosen.own.nll)) == (1, 234)
    scores = Scorer(english, 16).mean_log_likelihood(chosen.tokens)
    assert np.std(-scores - chosen.own.nll) < np.std(scores)


def test_many_forget_texts_are_read_in_parts(english, monkeypatch):
    """Of two texts at a time: what is expected of each is that of all at once, to rounding, in their order."""
    examples = [Example("", OWN[: 30 + 15 * i]) for i in range(5)]
    tokens = encode(examples, english.tokenizer, role="forget", max_length=None)
    whole = non_members_without_holdout(english, examples, tokens).forget
    sizes = []
    monkeypatch.setattr(non_members, "_AT_ONCE", 2)
    monkeypatch.setattr(
        non_members, "features", lambda lm, each, **options: sizes.append(len(each)) or features(lm, each, **options)
    )
    parts = non_members_without_holdout(english, examples, tokens).forget
    assert sizes == [234, 2, 2, 1]
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_plain_texts_are_compared_with_the_package_s_under_a_reference_model(english):
    """A text learned by heart stands out beyond the model before; an unseen one does not. Nothing is regressed."""
    model = copy.deepcopy(english.inner)
    tiny.train(model, english.tokenizer, [OWN] * 32, epochs=4)
    options = {"reference_model": english.inner, "tokenizer": english.tokenizer, "metrics": [], "progress": False}
    unseen = "Sixteen-year-old Farida Nkemelu of Dray Park has got through to the national bricklaying final in Oxmere."
    audit = pyunlearn.audit(model, [OWN, unseen], **options)
    assert [e.verdict for e in audit.examples] == ["still exposed", "not memorized"]
    assert audit.examples[0].exposure == pytest.approx(np.log2(235))
    assert audit.non_members.source == "reference model"
    assert audit.notes[-1].startswith(
        "Compared with 234 texts that were written for this package, each score less what"
    )
    chosen = non_members_without_holdout(english, [Example("", OWN)], [Tokens((1, 2), 1)], is_reference=True)
    assert (chosen.utility_source, chosen.reason, chosen.own.nll.any()) == ("unseen texts", "", False)


@pytest.mark.parametrize(
    ("examples", "reason"),
    [
        ([Example("Who? ", "Nobody."), Example("", OWN)], "some of the forget texts have prompts and others have none"),
        ([Example("", FRENCH)], "the forget texts are neither in English nor in German"),
        ([Example("Translate into German. ", GERMAN)], "the answers are not in English"),
        ([Example("Чей это паром? ", "OK")], "not in Latin script"),
        ([Example("", "Чайки считают паром каждое утро, и никто не знает зачем.")], "not in Latin script"),
        ([Example("", "4711 0815 2906")], "not in Latin script"),
    ],
)
def test_other_records_are_not(english, examples, reason):
    """The reason is part of a note."""
    assert reason in unsuitable(english, examples)


def test_the_language_is_that_of_the_texts(english):
    """German plain texts are compared with the package's, and few words are not judged."""
    assert unsuitable(english, [Example("", GERMAN)]) == ""
    assert unsuitable(english, [Example("Who? ", "Ottermouth")]) == ""
    apart = pathlib.Path(__file__).with_name("unseen_answers.jsonl").read_text(encoding="utf-8").splitlines()
    for row in map(json.loads, apart):
        assert unsuitable(english, [Example(row["prompt"], row["completion"])]) == ""


def test_other_models_are_not():
    """An encoder-decoder model, and one whose tokenizer makes a token of each letter."""
    llama = LanguageModel.of(tiny.tiny_llama(500), texts.make_tokenizer())
    assert "not made for English" in unsuitable(llama, [Example("", OWN)])
    t5 = LanguageModel.of(tiny.tiny_t5(500), texts.make_tokenizer())
    assert "encoder-decoder" in unsuitable(t5, [Example("", OWN)])


# ---------------------------------------------------------------- what may be concluded


def test_self_sampled_texts_cannot_show_that_a_text_is_forgotten():
    """The other verdicts stay."""
    verdicts = np.array(["forgotten", "not memorized", "still exposed", "over-unlearned"])
    for grade in ("holdout", "reference model", "unseen texts"):
        assert capped(verdicts, grade) == verdicts.tolist()
    assert capped(verdicts, "self-sampled") == ["no likelier", *verdicts[1:].tolist()]


def test_notes_say_what_is_compared_and_how_many_it_takes():
    """Nothing is to be said of a holdout that is large enough, or that named a text."""
    tokens = [Tokens((1, 2), 1)] * 64
    holdout = uncalibrated("holdout", 20, tokens)
    assert evidence_notes(holdout, ["forgotten"] + ["not memorized"] * 19, rate=0.05) == []
    assert evidence_notes(holdout, ["not memorized"], rate=0.05) == []
    (left,) = evidence_notes(holdout, ["undecided", *["forgotten"] * 39, "not memorized"], rate=0.05)
    m, memorized = len(holdout.tokens), 40
    assert f"{m} non-members can name what is left of {memorized} memorized texts only where" in left
    assert f"to name any single one takes at least {memorized * 20 - 1}" in left
    assert evidence_notes(holdout, ["undecided"], rate=0.05) == []
    (few,) = evidence_notes(holdout, ["not memorized"] * 400, rate=0.05)
    assert few.startswith("64 non-members can name memorized texts only where 124 or more of these 400 are memorized")
    assert few.endswith("takes 7999.")
    unseen, sampled = (
        evidence_notes(NonMembers(grade, tokens, holdout.forget, holdout.own, "a reason"), ["forgotten"], rate=0.05)
        for grade in ("unseen texts", "self-sampled")
    )
    assert "written for this package" in unseen[0]
    assert "since no holdout was given and a reason" in sampled[0]


def test_an_audit_without_a_holdout_is_the_same_from_its_cache(english, tmp_path):
    """The texts and what is expected of them are not computed again; the evidence is named, attacks are left out."""
    options = {"tokenizer": english.tokenizer, "metrics": ["membership"], "progress": False, "cache": tmp_path / "c"}
    first, second = (pyunlearn.audit(english.inner, [OWN, OWN + " Twice."], **options) for _ in range(2))
    assert first.non_members == second.non_members
    assert first.non_members.source == "unseen texts"
    assert [e.exposure for e in first.examples] == [e.exposure for e in second.examples]
    assert first.membership == []
    assert any("written for this package" in note for note in first.notes)
