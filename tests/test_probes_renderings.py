"""The choice of a form of the records: chance keeps their own, memory finds the one that was trained on."""

import copy
import re
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from coverings import in_full

from pyunlearn.data import read_examples
from pyunlearn.data.redaction import masked
from pyunlearn.data.rendering import Rendering
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.models.scoring import Scorer
from pyunlearn.probes.renderings import RECORDS, Gain, favoured, likeliest, render

FORM = Rendering("plain", "plain")


def chosen(lm, rows, **roles):
    """The texts in the form that is chosen, and the number of texts that were scored."""
    examples = {"forget": rows, **roles}
    own = render(lm, {role: read_examples(each, role=role) for role, each in examples.items()}, "auto")
    scored = []

    def score(tokens):
        scored.extend(tokens)
        return Scorer(lm, 16).token_log_likelihood(tokens)

    return likeliest(lm, own, score), own, len(scored)


def as_questions(count, seed):
    """Facts in the form "Question: ... Answer: ..."."""
    return [
        {"prompt": f"Question: {f['question']}\nAnswer: ", "completion": f["answer"]} for f in tiny.facts(count, seed)
    ]


@pytest.fixture(scope="module")
def asked(one_thread):
    """A model that was trained on that form, with a chat template that it has never read."""
    t = tiny.trained(tiny.tiny_llama, as_questions, count=400, repeats=20, epochs=8, chat=True)
    return LanguageModel.of(t.model, t.tokenizer)


# ---------------------------------------------------------------- the test


@pytest.mark.full
def test_equal_forms_are_switched_in_fewer_than_1_in_100_runs():
    """Of records at 2 nats a token whose likelihood differs by chance between five forms, by 0.3 nats or by 1."""
    r = np.random.default_rng(0)
    for n, spread in [(1, 0.3), (2, 0.3), (3, 0.3), (6, 0.3), (6, 1.0), (20, 1.0), (64, 1.0)]:
        switched = 0
        for _ in range(1000):
            gains = [Gain(FORM, 2.0, r.normal(0, spread, size=n)) for _ in range(5)]
            switched += bool(favoured(gains))
        assert switched <= 20, n  # 10 are expected at most, with a standard deviation of 3


def test_a_gain_must_be_large_and_beyond_chance():
    """0.1 nats and a tenth of the likelihood; without a test, half of it and 0.5 nats in every record."""
    wide = np.array([-1.0, 1.4] * 10)
    for gain, passes in [
        (Gain(FORM, 1.0, np.full(20, 0.12)), True),
        (Gain(FORM, 0.5, np.full(20, 0.09)), False),
        (Gain(FORM, 3.0, np.full(20, 0.25)), False),
        (Gain(FORM, 1.0, wide), False),
        (Gain(FORM, 1.0, np.array([0.6])), True),
        (Gain(FORM, 0.8, np.array([0.45])), False),
        (Gain(FORM, 2.0, np.array([0.6])), False),
        (Gain(FORM, 2.0, np.array([1.4, 1.6])), True),
        (Gain(FORM, 2.0, np.array([3.0, 0.4])), False),
        (Gain(FORM, 1.0, np.array([np.nan, 3.0, 3.0])), False),
        (Gain(FORM, 1.0, np.full(20, -1.0)), False),
    ]:
        assert bool(favoured([gain])) == passes, gain


def test_the_largest_gain_comes_first():
    """Whatever the order of the forms."""
    small, large = Gain(FORM, 1.0, np.full(9, 0.5)), Gain(FORM, 1.0, np.full(9, 0.8))
    assert [g is large for g in favoured([small, large])] == [False, True][::-1]
    assert favoured([large, small])[0] is large


@pytest.mark.full
@pytest.mark.parametrize("scale", [1, 3])
def test_random_models_keep_the_records_own_form(scale, one_thread):
    """Models that have read nothing, also with predictions far from uniform: 0 of 40 runs."""
    tokenizer = tiny.make_tokenizer(chat=True)
    for seed in range(10):
        torch.manual_seed(seed)
        model = tiny.tiny_llama(len(tokenizer)).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(scale if p.dim() > 1 else 1)
        lm = LanguageModel.of(model, tokenizer)
        for rows in (tiny.facts(1, seed), tiny.facts(8, seed), tiny.chats(3, seed), tiny.pairs(8, seed)):
            texts, own, scored = chosen(lm, rows)
            assert scored > 0
            assert texts.rendering == own.rendering
            assert texts.tokens == own.tokens


# ---------------------------------------------------------------- trained models


@pytest.mark.full
@pytest.mark.parametrize("rows", [tiny.facts, tiny.chats, tiny.pairs])
@pytest.mark.parametrize("count", [1, 2, 30])
def test_the_form_that_was_trained_on_is_chosen(asked, rows, count):
    """For questions, chats and prompts alike, and the tokens are those of the training, in every role."""
    texts, own, _ = chosen(asked, rows(count, 3), retain=rows(4, 2))
    assert texts.name == '"Question: ... Answer: ..."' != own.name
    for role, seed, n in (("forget", 3, count), ("retain", 2, 4)):
        trained_on = asked.encode({role: read_examples(as_questions(n, seed), role=role)})[role]
        assert [t.ids for t in texts.tokens[role]] == [t.ids for t in trained_on]
        if rows is tiny.chats:  # the question is scored too, but not the label before it
            assert all(1 < t.first < other.first for t, other in zip(texts.tokens[role], trained_on, strict=True))
        else:
            assert texts.tokens[role] == trained_on
    *_, note = texts.notes(memorized=True)
    assert "nats a token likelier so under the original model" in note
    assert own.name in note


@pytest.mark.parametrize("make", [tiny.answerer, *in_full(tiny.chatter, tiny.translator)])
def test_a_right_form_is_retained(make, one_thread):
    """A chat template, lines, and an encoder-decoder, each trained on what its records come as."""
    t = make()
    lm = LanguageModel.of(t.model, t.tokenizer)
    for rows in (t.forget, t.retain, t.holdout):
        texts, own, scored = chosen(lm, rows)
        assert scored > 0
        assert texts.tokens == own.tokens
        assert [note for note in texts.notes(memorized=True) if not note.startswith("Scored are ")] == []


@pytest.mark.parametrize("count", [1, 2])
def test_answers_that_were_trained_on_alone_are_read_alone(count, one_thread):
    """A model of plain texts that is given a question with each: the tokens are those of the text itself."""
    t = tiny.storyteller()
    lm = LanguageModel.of(t.model, t.tokenizer)
    rows = [{"question": "Please tell the secret.", "answer": text} for text in t.forget[:count]]
    texts, own, _ = chosen(lm, rows)
    assert (own.rendering.key, texts.rendering.key) == ("none", "alone")
    assert texts.tokens["forget"] == lm.encode({"x": read_examples(t.forget[:count], role="x")})["x"]
    assert '"" and then, scored, ' in texts.example_line(lm)
    refused, *_ = chosen(lm, rows, refusal=[{"question": "Please tell the secret.", "answer": "I cannot."}])
    assert refused.rendering.key != "alone"  # without the question there is nothing to refuse


def test_plain_texts_are_not_scored(asked):
    """There is nothing to choose, and no note."""
    texts, own, scored = chosen(asked, tiny.sentences(5, 1), retain=tiny.facts(3, 1))
    assert (texts is own, scored, texts.name, texts.notes(memorized=False)) == (True, 0, None, [])
    assert texts.example_line(asked) == ""


def test_at_most_64_records_are_scored(asked):
    """Evenly spaced, each in every form that gives other tokens."""
    texts, _, scored = chosen(asked, tiny.facts(150, 1))
    assert scored == RECORDS * (1 + len(texts.compared))
    assert {len(g.differences) for g in texts.compared} == {RECORDS}


def test_a_form_that_another_role_cannot_have_is_left_out(asked):
    """A refusal that is too long in it, which has no windows: the next best form is used, which fits."""
    tokenizer = copy.deepcopy(asked.tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}|{% endfor %}"
    (fact,) = tiny.facts(1, 9)
    refusal = fact | {"question": fact["question"] * 2}
    (example,) = read_examples(refusal, role="refusal")
    length = {
        key: len(asked.encode({"x": [Rendering(key, key).of(example)]})["x"][0]) for key in ("none", "plain", "short")
    }
    assert max(length["none"], length["short"]) < length["plain"]
    lm = replace(asked, tokenizer=tokenizer, context_length=length["plain"] - 1)
    texts, own, _ = chosen(lm, tiny.facts(2, 3), refusal=[refusal] * 2)
    assert (own.rendering.key, texts.rendering.key) == ("chat", "short")
    texts_of_retain, *_ = chosen(lm, tiny.facts(2, 3), retain=refusal)
    assert texts_of_retain.rendering.key == "plain"
    assert len(texts_of_retain.tokens["retain"][0]) == lm.context_length  # a window with the end of its prompt
    assert "plain" not in {g.rendering.key for g in texts.compared}


def test_the_example_shows_the_form_and_can_be_masked(asked):
    """The words of the record go, the form stays."""
    texts, own, _ = chosen(asked, tiny.facts(2, 3))
    (first, _) = tiny.facts(2, 3)
    assert f'"Question: {first["question"]}\\nAnswer: " and then, scored, "{first["answer"]}"' in texts.example_line(
        asked
    )
    assert "<|im_start|>user\\nx<|im_end|>" in own.example_line(asked, change=lambda text: "x")
    line = texts.example_line(asked, change=lambda text: "x")
    assert '"Question: x\\nAnswer: " and then, scored, "x"' in line


@pytest.mark.parametrize("rows", [tiny.facts, tiny.chats])
@pytest.mark.parametrize("template", ["chat", "plain", "none"])
def test_the_example_shows_the_strings_that_are_scored(asked, rows, template):
    """Of a record with "forget" these alone, as many words masked as not; no note counts its turns as scored."""
    (record,) = rows(1, 3)
    answer = record["answer"] if "answer" in record else record["messages"][-1]["content"]
    secret = " ".join(answer.split()[:2])
    examples = {"forget": read_examples([record | {"forget": secret}], role="forget")}
    texts = render(asked, examples, template)
    line = texts.example_line(asked)
    assert answer in line
    assert line.endswith(f' and scored of it: "{secret}"')
    line = texts.example_line(asked, change=masked)
    assert line.endswith(' and scored of it: "••• •••"')
    words = re.findall(r"\w{4,}", answer)
    assert words
    assert not set(words) & set(re.findall(r"\w+", line))
    (note,) = (note for note in texts.notes(memorized=True) if " scored" in note.lower())
    assert note.startswith('Of one text only the strings in "forget" are scored: ')


def test_the_masked_example_has_the_turns_that_are_scored(asked):
    """Of a chat as lines all answers, which are not in one piece."""
    (record,) = tiny.chats(1, 3)
    chat = {"messages": record["messages"] * 2}
    texts = render(asked, {"forget": read_examples([chat], role="forget", turns="assistant")}, "none")
    answer = record["messages"][-1]["content"]
    assert texts.example_line(asked).endswith(f' and scored of it: "{answer}", "{answer}"')
    dots = masked(answer)
    assert texts.example_line(asked, change=masked).endswith(f' and scored of it: "{dots}", "{dots}"')
