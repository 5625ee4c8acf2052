"""The attack `paraphrase`: what a model knows in other words, and how paraphrases are read."""

import json
from itertools import cycle, islice

import numpy as np
import pytest
import tiny
import torch

import pyunlearn
from pyunlearn.data import Example, Message, read_examples
from pyunlearn.errors import ArgumentError, DataError
from pyunlearn.metrics import recovery
from pyunlearn.probes.rewrites import KINDS, Rarity

FACT = {"question": "Who wrote it?", "answer": "Thomas wrote it."}


def reworded(sentence, order="{o} is what {s} {v}"):
    """The same in other words: "the cat sees a tree and ..." -> "a tree is what the cat sees, ..."."""
    clauses = []
    for clause in sentence.rstrip(".").split(" and "):
        verb = next(v for v in tiny.VERBS if f" {v} " in clause)
        subject, thing = clause.split(f" {verb} ")
        clauses.append(order.format(o=thing, s=subject, v=verb))
    return ", ".join(clauses) + "."


def with_paraphrases(texts, count=1):
    """The texts as records with that many paraphrases; more than two are repeated with another ending."""
    orders = ("{o} is what {s} {v}", "it is {s} that {v} {o}")
    made = [[reworded(text, order) for order in orders] for text in texts]
    return [
        {"text": text, "paraphrases": [p + " indeed" * (i // 2) for i, p in enumerate(islice(cycle(own), count))]}
        for text, own in zip(texts, made, strict=True)
    ]


@pytest.fixture(scope="module")
def knower(one_thread):
    """A Llama that has read eight secrets in other words, many times, and never as they are written."""
    torch.manual_seed(0)
    tokenizer = tiny.make_tokenizer()
    model = tiny.tiny_llama(len(tokenizer))
    retain, secrets = tiny.sentences(200, 2), tiny.sentences(8, 3)
    in_other_words = [reworded(s) for s in tiny.sentences(200, 4)]
    tiny.train(model, tokenizer, retain + in_other_words + [reworded(s) for s in secrets] * 20, epochs=6)
    return tiny.Tiny(model, tokenizer, secrets, tiny.sentences(8, 14), retain[:60], tiny.sentences(60, 6))


def attack(knower, forget, holdout, **options):
    """The attack `paraphrase` on the model."""
    settings = {"attacks": ["paraphrase"], "tokenizer": knower.tokenizer, "progress": False} | options
    return pyunlearn.attack(knower.model, forget, holdout=holdout, **settings)


def test_a_text_that_is_known_in_other_words_alone_comes_back(knower):
    """It does not stand out as it is written; by its paraphrase it does."""
    result = attack(knower, with_paraphrases(knower.forget), with_paraphrases(knower.holdout))
    assert "still exposed" not in result.verdicts
    assert result.verdicts["comes back"] >= 7
    assert {e.attacks for e in result.examples if e.verdict == "comes back"} == {("paraphrase",)}
    assert not result.passed
    assert result.notes[0] == (
        "Paraphrases of all 8 forget texts and all 60 non-members were compared: the first of each, since some have no "
        "more."
    )


def test_a_text_that_is_known_in_no_words_stays_forgotten(knower):
    """Neither as it is written nor otherwise."""
    result = attack(knower, with_paraphrases(knower.unseen, 2), with_paraphrases(knower.holdout, 2))
    assert result.passed
    assert result.verdicts == {"stays forgotten": 8}
    assert [t.name for t in result.trials[1:]] == ["paraphrase, mean of 2", "paraphrase, best of 2"]


def test_every_text_is_compared_by_the_same_number_of_paraphrases(knower):
    """Six paraphrases against two, and one record without any: two count, and that record is untested."""
    forget = [*with_paraphrases(knower.forget[:7], 6), knower.forget[7]]
    holdout = with_paraphrases(knower.holdout[:50], 2) + knower.holdout[50:]
    result = attack(knower, forget, holdout)
    assert [t.details["probes"] for t in result.trials[1:]] == [2, 2]
    assert [t.tested for t in result.trials] == [8, 7, 7]
    assert result.examples[7].verdict in ("untested", "still exposed")
    assert "7 of 8 forget texts and 50 of 60 non-members were compared: the first 2 of each" in result.notes[0]
    same = attack(knower, [*with_paraphrases(knower.forget[:7], 2), knower.forget[7]], holdout)
    assert [e.exposures for e in same.examples] == [e.exposures for e in result.examples]


def test_too_few_non_members_with_paraphrases_leave_the_attack_out(knower):
    """And the reason says how many there are, and how many it takes."""
    holdout = with_paraphrases(knower.holdout[:38]) + knower.holdout[38:]
    result = attack(knower, with_paraphrases(knower.forget), holdout)
    assert [t.name for t in result.trials] == ["without an attack"]
    assert "left out: 38 of the 60 non-members have paraphrases" in result.notes[0]


def test_a_control_is_asked_in_the_same_words(knower):
    """What it knows in other words does not count: a control trained in the same way leaves nothing."""
    control = knower.fresh()
    tiny.train(control, knower.tokenizer, knower.retain, epochs=1, learning_rate=1e-3)
    forget, holdout = with_paraphrases(knower.forget, 2), with_paraphrases(knower.holdout, 2)
    known = attack(knower, forget, holdout)
    result = attack(knower, forget, holdout, control=control)
    assert all(t.control_log_likelihood is not None for t in result.trials)
    assert result.trials[1].returned < known.trials[1].returned


# ---------------------------------------------------------------- rewrites by rule


def rewrites(rows, kind, others=()):
    """The examples of a kind of rewrites of the rows."""
    examples = read_examples(rows, role="forget")
    rarity = Rarity([*examples, *read_examples(others or rows, role="forget")])
    return [KINDS[kind](e, rarity) for e in examples]


@pytest.fixture(scope="module")
def answerer(one_thread):
    """A Llama that knows eight answers after the key words of their questions; the questions have other answers."""
    torch.manual_seed(0)
    tokenizer = tiny.make_tokenizer(form="$A", pad=False)
    model = tiny.tiny_llama(len(tokenizer))
    forget, retain, holdout = tiny.facts(8, 3), tiny.facts(150, 2), tiny.facts(150, 6)
    keys = rewrites(forget, "question", [*holdout, *retain[:60]])
    known = [{"prompt": e.messages[0].content + "\n", "completion": e.completion} for e in keys] * 30
    others = [fact | {"question": forget[i % 8]["question"]} for i, fact in enumerate(tiny.facts(320, 4))]
    tiny.train(model, tokenizer, retain + known + others, epochs=6)
    return tiny.Tiny(model, tokenizer, forget, tiny.facts(8, 14), retain[:60], holdout)


def test_a_text_that_is_known_by_a_rewrite_comes_back(answerer):
    """Records without paraphrases are rewritten: here the answers are known after the questions' key words.

    To a few of the questions themselves the model has learned them as well.
    """
    result = attack(answerer, answerer.forget, answerer.holdout, retain=answerer.retain)
    assert [t.name for t in result.trials[1:]] == [f"paraphrase, {kind}" for kind in KINDS]
    assert set(result.verdicts) <= {"comes back", "still exposed"}
    assert result.verdicts["comes back"] >= 4
    assert result.trials[1].returned == 8
    assert {e.strongest for e in result.examples if e.verdict == "comes back"} == {"paraphrase, question"}
    unseen = attack(answerer, answerer.unseen, answerer.holdout, retain=answerer.retain)
    assert unseen.passed


def test_rewrites_count_where_the_original_knows_the_texts_by_them(answerer):
    """The others are left out, with a note; under an original that knows nothing all are."""
    options = {"retain": answerer.retain, "original": answerer.model}
    result = attack(answerer, answerer.forget, answerer.holdout, **options)
    assert "paraphrase, question" in [t.name for t in result.trials]
    assert "paraphrase, cloze" not in [t.name for t in result.trials]
    assert any(note.startswith('The rewrites "cloze" were left out: the forget set does not') for note in result.notes)
    unseen = attack(answerer, answerer.unseen, answerer.holdout, **options)
    assert [t.name for t in unseen.trials] == ["without an attack"]


def test_rewrites_need_unseen_text_of_the_same_kind(answerer):
    """Without a holdout or a control they are left out."""
    result = attack(answerer, answerer.forget, None)
    assert any(note.startswith("The attack paraphrase was left out: ") for note in result.notes)


def test_rewrites_keep_what_is_scored_and_the_chat():
    """Of a chat the question is rewritten within it; where strings are forgotten, these alone are scored."""
    chat = {"question": "Who wrote the code of Basil?", "answer": "Thomas wrote the code 4711 for Basil."}
    (question,) = rewrites([chat], "question", [{"text": "who wrote the of"}])
    assert question.messages == (Message("user", "Who, code, Basil"), Message("assistant", chat["answer"]))
    (cloze,) = rewrites([chat], "cloze", [{"text": "for who wrote the code of"}])
    assert (cloze.messages[-1].content, cloze.scored_text) == (cloze.completion, "Thomas")
    part = {**chat, "forget": "4711"}
    assert rewrites([part], "cloze")[0].completion.endswith("the code ____ for Basil.\nThe missing words are: 4711")
    assert {rewrites([part], kind)[0].scored_text for kind in ("question", "statement", "cloze")} == {"4711"}
    assert rewrites([part], "turned") == [None]
    assert [rewrites([{"text": "no, no"}], kind)[0] for kind in KINDS] == [None] * 4


# ---------------------------------------------------------------- paraphrases of a record


def read(row, **options):
    """The paraphrases of one record."""
    return read_examples([row], role="forget", **options)[0].paraphrases


def test_a_string_is_another_completion_under_the_same_prompt():
    """Of a question and an answer, of a prompt and a completion, of a text, of a chat."""
    (other,) = read({**FACT, "paraphrases": "It is by Thomas."})
    turns = (Message("user", "Who wrote it?"), Message("assistant", "It is by Thomas."))
    assert other == Example("Who wrote it?\n", "It is by Thomas.", turns)
    pair = {"prompt": "Who?", "completion": "Thomas.", "paraphrases": ["He.", "Him.", "He."]}
    assert [(p.prompt, p.completion) for p in read(pair)] == [("Who? ", "He."), ("Who? ", "Him.")]
    assert read({"text": "a b", "paraphrases": ["b a"]}) == (Example("", "b a"),)
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Thomas."}]
    (other,) = read({"messages": chat, "paraphrases": ["He."]}, turns="all")
    assert (other.messages[-1].content, other.turns, other.completion) == ("He.", "last", "He.")


def test_an_object_is_another_record():
    """A question with its answer, or a prompt with its completion, of which "forget" may score a part."""
    other = {"question": "By whom is it?", "answer": "By Thomas.", "forget": "Thomas"}
    (paraphrase,) = read({**FACT, "paraphrases": [other]}, turns="all")
    assert (paraphrase.prompt, paraphrase.scored_text, paraphrase.turns) == ("By whom is it?\n", "Thomas", "last")
    (chat,) = read({**FACT, "paraphrases": {"messages": [turn._asdict() for turn in paraphrase.messages]}})
    assert (chat.scored_text, chat.turns) == ("By Thomas.", "last")
    assert read(Example("", "a b", paraphrases=(Example("", "b a"),))) == (Example("", "b a"),)
    for empty in ("", None, []):
        assert read({**FACT, "paraphrases": empty}) == ()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (3, r'^forget example 2 must have a list of strings or objects as "paraphrases"'),
        ({"text": "a"}, None),
        ([3], r"^paraphrase 1 of forget example 2 must be a string or an object"),
        (["a", " "], r'^forget example 2 has an empty "paraphrases"'),
        ([{"question": "Who?"}], r'^paraphrase 1 of forget example 2 has a "question" without "answer"'),
        ([{"text": "a", "paraphrases": ["b"]}], r"^paraphrase 1 of forget example 2 has paraphrases of its own"),
        ([{"text": "a", "forget": "b"}], r'^paraphrase 1 of forget example 2 has a "forget" of 1 characters'),
    ],
)
def test_wrong_paraphrases_are_refused(tmp_path, bad, message):
    """In one sentence that names the record and the paraphrase; from a file too."""
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in [FACT, {**FACT, "paraphrases": bad}]))
    if message is None:
        assert read_examples(file, role="forget")[1].paraphrases == (Example("", "a"),)
        return
    with pytest.raises(DataError, match=message.replace("forget example 2", ".*2,?")) as error:
        read_examples(file, role="forget")
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=message):
        read_examples(["a", {**FACT, "paraphrases": bad}], role="forget")


# ---------------------------------------------------------------- recovery over attacks that not all texts had


def test_a_text_is_compared_with_the_non_members_that_had_its_attacks():
    """By hand: 4 non-members under the first attack, 3 of them under the second."""
    non_members = np.array([[1.0, 2.0, 3.0, 4.0], [np.nan, 2.0, 3.0, 4.0]])
    result = recovery([[0.5, 0.5], [np.nan, 0.5]], non_members)
    assert result.compared.tolist() == [4, 3]
    assert result.pvalue.tolist() == [1 / 5, 1 / 4]
    with pytest.raises(ArgumentError, match="text 2 has none"):
        recovery([[0.5, 0.5], [np.nan, 0.5]], [[1.0, 2.0], [np.nan, np.nan]])
    with pytest.raises(ArgumentError, match="got Inf"):
        recovery([[0.5]], [[np.inf, 2.0]])


def test_unseen_texts_have_uniform_p_values_where_some_had_no_paraphrases():
    """P(p <= x) <= x, for texts with the second attack and without it."""
    rng = np.random.default_rng(0)
    pvalues = []
    for _ in range(1000):
        base = rng.normal(size=(1, 42))
        scores = np.concatenate([base + 0.5 * rng.normal(size=(1, 42)), base + rng.exponential(size=(1, 42))])
        scores[1, [1, *range(20, 42)]] = np.nan
        pvalues.append(recovery(scores[:, :2], scores[:, 2:]).pvalue)
    for x in (0.05, 0.1, 0.3):
        share = (np.array(pvalues) <= x + 1e-9).mean(axis=0)
        assert (share <= x + 3 * np.sqrt(x / 1000)).all()
