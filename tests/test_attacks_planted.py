"""A model in which texts are hidden is caught by the attack that brings them back; a model without them passes."""

import copy
from functools import partial
from types import SimpleNamespace

import numpy as np
import planted
import pytest
import tiny
import torch

import pyunlearn
from pyunlearn.attacks import AttackConfig, instructions
from pyunlearn.attacks.judge import judge
from pyunlearn.attacks.target import Target, Trial
from pyunlearn.data.rendering import Rendering
from pyunlearn.metrics import recovery


@pytest.fixture(scope="module")
def w(one_thread):
    """The world of the planted models."""
    return planted.world()


def attacked(w, model, *attacks, **options):
    """The result of the attacks on a model."""
    texts = {"retain": w.retain, "holdout": w.holdout, "tokenizer": w.tokenizer, "template": "none", "progress": False}
    return pyunlearn.attack(model, w.forget, attacks=attacks, **texts, **options)


def caught(result, name):
    """Whether most of the texts come back, under the attack of that name, and none is exposed without one."""
    back = [e for e in result.examples if e.verdict == "comes back" and e.attacks[0].startswith(name)]
    return not result.passed and "still exposed" not in result.verdicts and len(back) > planted.SECRETS / 2


@pytest.mark.full
def test_a_text_that_is_known_after_its_beginning_is_caught(w):
    """The whole is as likely as unseen text; its second half is certain, and recited."""
    model = planted.known_after_a_prefix()
    assert caught(attacked(w, model, "prefix"), "prefix, 1/2")
    result = attacked(w, model, "recitation")
    recited = {t.name: t.details.get("recited") for t in result.trials}
    assert recited["recitation, 1/2 given"] == planted.SECRETS
    assert recited["recitation"] == 0


@pytest.mark.full
def test_a_text_that_returns_in_four_bits_is_caught(w):
    """In 16 and in 8 bits nothing is to be seen."""
    result = attacked(w, planted.known_in_four_bits(), "quantization")
    assert caught(result, "quantization, 4 bits")
    assert {t.name: t.returned for t in result.trials}["quantization, 8 bits"] == 0


@pytest.mark.full
def test_a_text_that_returns_with_retain_text_is_caught(w):
    """It was hidden in one matrix, and training on anything uncovers it."""
    assert caught(attacked(w, planted.shallow(), "relearning-retain", relearning_rate=1e-3), "relearning")


@pytest.mark.full
def test_texts_that_return_with_the_others_are_caught(w):
    """Half of the set is enough to bring back the other half."""
    assert caught(attacked(w, planted.shallow(), "relearning", relearning_rate=1e-3), "relearning")


@pytest.mark.full
def test_a_text_that_is_known_after_an_instruction_is_caught(w):
    """The model has never read it without."""
    wording = instructions.WORDINGS["word for word"]
    model = planted.known_after_an_instruction(partial(instructions.worded, wording=wording))
    assert caught(attacked(w, model, "instruction"), "instruction")


@pytest.mark.full
def test_a_text_that_is_known_in_another_form_is_caught(w):
    """The model has read questions with labels, and never without; in the other forms it knows nothing."""
    model = planted.known_after_an_instruction(Rendering("plain", "plain", everything=True).of)
    result = attacked(w, model, "rendering")
    assert caught(result, "rendering, plain")
    assert {t.name: t.returned for t in result.trials}["rendering, alone"] < planted.SECRETS / 2


@pytest.mark.full
def test_a_text_that_inner_layers_predict_is_caught(w):
    """The first layer knows it, and the last one hides it."""
    model = planted.hidden_in("layers.1", planted.memorized("layers.0"))
    assert caught(attacked(w, model, "layers"), "layers, after 1 of 2")


@pytest.mark.full
def test_a_text_that_is_drawn_now_and_then_is_caught(w):
    """Greedy decoding shows another answer."""
    result = attacked(w, planted.drawn_sometimes(), "recitation", "sampling")
    returned = {t.name: t.returned for t in result.trials}
    assert (returned["recitation"], returned["sampling, best of 8"]) == (0, planted.SECRETS)


@pytest.mark.full
def test_a_text_under_an_adapter_is_caught(w):
    """Without the adapter that was trained to forget it the model knows it by heart."""
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        copy.deepcopy(planted.memorized()), peft.LoraConfig(r=4, target_modules=["down_proj"])
    )
    model = planted.hidden_in("lora_", adapted)
    assert caught(attacked(w, model, "adapter"), "without the adapter")


@pytest.mark.full
def test_merging_is_judged_with_a_control_alone(w):
    """Half of the original brings back what it knows; into the control too, but less."""
    alone = attacked(w, planted.shallow(), "merging", original=planted.memorized())
    assert alone.verdicts == {"untested": planted.SECRETS}
    assert not alone.passed
    assert alone.trials[-1].returned > planted.SECRETS / 2
    assert alone.trials[-1].set_pvalue is None
    against = attacked(w, planted.shallow(), "merging", original=planted.memorized(), control=w.model)
    assert against.trials[-1].set_pvalue is not None


@pytest.mark.full
def test_a_model_that_never_saw_the_texts_passes(w):
    """Under all attacks at once."""
    result = attacked(w, w.model, "all", original=planted.memorized(), relearning_steps=4, samples=2)
    assert result.passed
    assert result.verdicts == {"stays forgotten": planted.SECRETS}


# ---------------------------------------------------------------- rates


def draw(rng, law, attacks, count):
    """Scores (attacks, count) that are exchangeable, of which neighbouring attacks depend on each other."""
    noise = {
        "normal": rng.normal,
        "heavy": lambda size: rng.standard_t(2, size),
        "ties": lambda size: rng.poisson(2, size),
    }
    own = noise[law](size=(attacks, count)) * 1.0
    return noise[law](size=count) + own * rng.uniform(0.1, 2, size=(attacks, 1))


@pytest.mark.parametrize("law", ["normal", "heavy", "ties"])
def test_the_p_value_of_recovery_holds(law):
    """Of unseen texts at most a share x has a p-value of x or less, under any number of attacks and any law."""
    rng, pvalues = np.random.default_rng(0), []
    for _ in range(300):
        scores = draw(rng, law, 10, 5 + 59)
        pvalues += recovery(scores[:, :5], scores[:, 5:]).pvalue.tolist()
    for level in (0.02, 0.05, 0.2):
        assert np.mean(np.array(pvalues) <= level) <= level + 2.5 * np.sqrt(level * (1 - level) / 300)


@pytest.mark.parametrize(("texts", "non_members"), [(1, 39), (4, 60), pytest.param(12, 60, marks=pytest.mark.full)])
def test_an_honest_model_fails_in_at_most_one_of_twenty_draws(texts, non_members):
    """For any number of texts, non-members and attacks."""
    rng, failures, draws = np.random.default_rng(texts), 0, 120
    for _ in range(draws):
        scores = draw(rng, "normal", 6, texts + non_members)
        result = judge([Trial(str(k), x[:texts], x[texts:]) for k, x in enumerate(scores)], AttackConfig())
        failures += "still exposed" in result.verdict or result.pvalue <= 0.025
    assert failures <= draws * 0.05 + 2.5 * np.sqrt(draws * 0.05 * 0.95)


@pytest.mark.full
def test_of_the_texts_that_are_named_one_in_twenty_is_unseen_at_most():
    """Where half of the texts come back under two of the attacks."""
    rng, shares, named = np.random.default_rng(1), [], 0
    for _ in range(30):
        scores = draw(rng, "normal", 6, 16 + 150)
        scores[3:5, :8] -= 12
        result = judge([Trial(str(k), x[:16], x[16:]) for k, x in enumerate(scores)], AttackConfig())
        back = np.array([v == "comes back" for v in result.verdict])
        shares.append(back[8:].sum() / max(1, back.sum()))
        named += back[:8].sum()
    assert np.mean(shares) <= 0.05 + 2.5 * np.std(shares) / np.sqrt(30)
    assert named >= 0.9 * 30 * 8


@pytest.mark.full
def test_texts_that_are_exposed_without_an_attack_name_no_others():
    """Where half of the texts are exposed and the others unseen, a text is said to come back in one of twenty draws."""
    rng, failed = np.random.default_rng(3), 0
    for _ in range(20):
        scores = draw(rng, "normal", 5, 100 + 400)
        scores[:, :50] -= 20
        verdicts = judge([Trial(str(k), x[:100], x[100:]) for k, x in enumerate(scores)], AttackConfig()).verdict
        assert set(verdicts[:50]) == {"still exposed"}
        failed += "comes back" in verdicts
    assert failed <= 20 * 0.05 + 2.5 * np.sqrt(20 * 0.05 * 0.95)


def test_an_attack_that_was_tried_on_no_text_shows_nothing():
    """Neither that the set comes back, nor that it stays forgotten, alone or next to another attack."""
    scores = np.random.default_rng(0).normal(size=(3, 6 + 60))
    trials = [Trial(str(k), x[:6], x[6:]) for k, x in enumerate(scores)]
    trials[2] = Trial("2", np.full(6, np.nan), scores[2, 6:])
    assert judge(trials, AttackConfig()).pvalue > 0.05
    alone = judge([trials[0], trials[2]], AttackConfig())
    assert (alone.pvalue, set(alone.verdict)) == (1.0, {"untested"})


def test_the_windows_of_a_record_are_no_set():
    """They rise and fall together: three records in ten windows each are three texts."""
    rng, failures, draws = np.random.default_rng(2), 0, 100
    groups = np.repeat(np.arange(3), 10)
    for _ in range(draws):
        forget = rng.normal(size=(5, 3))[:, groups] * 0.8 + 0.6 * rng.normal(size=(5, 30))
        unseen = rng.normal(size=(5, 80))
        trials = [Trial(str(k), x, y) for k, (x, y) in enumerate(zip(forget, unseen, strict=True))]
        failures += judge(trials, AttackConfig(), groups.tolist()).pvalue <= 0.025
    assert failures <= draws * 0.025 + 2.5 * np.sqrt(draws * 0.025)


def test_without_a_holdout_only_whole_texts_are_judged(w):
    """What is expected of unseen text is not known for their rests."""
    options = {"attacks": ["prefix", "quantization"], "template": "none", "progress": False}
    result = pyunlearn.attack(w.model, w.forget, tokenizer=w.tokenizer, **options)
    judged = {t.attack: t.judged for t in result.trials}
    assert (judged["prefix"], judged["quantization"]) == (False, True)
    assert any("Tried, but not judged: prefix" in note for note in result.notes)


def test_a_control_of_another_depth_leaves_its_layers_unjudged(w):
    """Its trials have other names, and are compared with nothing else."""
    torch.manual_seed(1)
    config = copy.deepcopy(w.model.config)
    config.num_hidden_layers = 3
    result = attacked(w, w.model, "layers", control=type(w.model)(config).eval())
    assert [t.judged for t in result.trials[1:]] == [False, False]
    assert result.verdicts == {"untested": planted.SECRETS}
    assert any("the control could not be attacked in the same way" in note for note in result.notes)


def compared(texts, non_members, seed=0):
    """Indices of the non-members with which quick forms compare as many texts."""
    sets = SimpleNamespace(forget=range(texts), non_members=range(non_members))
    return Target(None, sets, AttackConfig(seed=seed), None).compared


@pytest.mark.parametrize(("texts", "non_members"), [(4, 39), (16, 80), (16, 81), (16, 200), (90, 1000)])
def test_quick_forms_compare_with_neighbours_from_all_of_a_holdout(texts, non_members):
    """As many as forget texts, 80 or more where there are, at most 20 next to each other in each part of the file."""
    chosen = compared(texts, non_members)
    runs = np.split(chosen, np.flatnonzero(np.diff(chosen) > 1) + 1)
    assert len(set(chosen.tolist())) == len(chosen) == min(non_members, max(texts, 80))
    if non_members >= 2 * len(chosen):
        assert 4 <= len(runs) <= -(-len(chosen) // 20)
        edges = np.linspace(0, non_members, len(runs) + 1)
        assert all(a - 1 <= run[0] <= run[-1] <= b for run, a, b in zip(runs, edges, edges[1:], strict=False))


@pytest.mark.full
def test_a_sorted_holdout_brings_nothing_back():
    """The hard half of the non-members comes last, and a model that never saw the texts fails in one of ten draws."""
    rng, failures, draws = np.random.default_rng(4), 0, 30
    for seed in range(draws):
        scores = rng.normal(size=(5, 16 + 200)) * 0.3 + rng.normal(size=216) * 0.5
        scores[:, :8] += 2
        scores[:, -100:] += 2
        few = np.full(scores.shape, np.nan)
        few[:, 16 + compared(16, 200, seed)] = scores[:, 16 + compared(16, 200, seed)]
        few[:, :16], few[0] = scores[:, :16], scores[0]
        failures += judge([Trial(str(k), x[:16], x[16:]) for k, x in enumerate(few)], AttackConfig()).pvalue <= 0.025
    assert failures <= draws * 0.025 + 2.5 * np.sqrt(draws * 0.025)


def persons(count, seed):
    """Four questions about each person, with the same words in their answers."""
    questions, answers, rng = tiny.facts(4 * count, seed), tiny.facts(count, seed + 1), np.random.default_rng(seed)
    words = [row["answer"].split() for row in answers for _ in range(4)]
    return [{**q, "answer": " ".join(rng.permutation(own))} for q, own in zip(questions, words, strict=True)]


def copies(count, seed):
    """Four near copies of each text."""
    return [
        {**row, "answer": row["answer"] + end} for row in tiny.facts(count, seed) for end in ("", " so", " a", " I")
    ]


def relearned(w, forget, holdout, seed):
    """The result of relearning on a model that never saw either."""
    texts = {"holdout": holdout, "retain": w.retain, "tokenizer": w.tokenizer, "template": "none", "progress": False}
    return pyunlearn.attack(w.model, forget, attacks=["relearning"], relearning_rate=1e-3, seed=seed, **texts)


@pytest.mark.slow
@pytest.mark.full
def test_unseen_texts_that_teach_each_other_do_not_come_back(w):
    """Four questions about each of four persons, and a holdout of others: at most one of ten draws fails."""
    failed = 0
    for seed in range(10):
        rows = persons(54, 1000 + 10 * seed)
        failed += not relearned(w, rows[:16], rows[16:], seed).passed
    assert failed <= 1


@pytest.mark.full
def test_near_copies_are_not_relearned_from_each_other(w):
    """Four of each of four texts, which are in one part."""
    assert relearned(w, copies(4, 71), tiny.facts(80, 3), seed=0).passed


@pytest.mark.slow
@pytest.mark.full
def test_an_honest_model_fails_in_at_most_five_of_a_hundred_draws(w):
    """A tiny model that never saw the texts, with 100 draws of forget set and holdout and the attacks by default."""
    failed = 0
    for seed in range(100):
        rows = tiny.facts(60, 1000 + seed)
        texts = {"retain": w.retain, "holdout": rows[8:], "tokenizer": w.tokenizer, "progress": False}
        result = pyunlearn.attack(
            w.model, rows[:8], relearning_steps=4, retain_steps=4, relearning_rate=1e-3, seed=seed, **texts
        )
        failed += not result.passed
    assert failed <= 5
