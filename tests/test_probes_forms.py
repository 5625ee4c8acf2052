"""Other forms of the forget texts: which there are, with what they are compared, and what is refused."""

import numpy as np
import pytest
import tiny

from pyunlearn.data import Tokens, read_examples
from pyunlearn.errors import DataError
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.probes.forms import require_forms, with_forms
from pyunlearn.probes.renderings import render
from pyunlearn.unlearning.preferences import with_refusals

FORMS = ["", "question", "statement", "turned", "cloze"]


@pytest.fixture(scope="module")
def lm():
    """A model that has learned nothing, with 96 positions."""
    tokenizer = tiny.make_tokenizer()
    return LanguageModel.of(tiny.tiny_llama(len(tokenizer)).eval(), tokenizer)


def roles(**texts):
    """The texts as examples by role."""
    return {role: read_examples(rows, role=role) for role, rows in texts.items()}


def paraphrased(rows, count=1):
    """The facts, each with answers in other words."""
    return [row | {"paraphrases": [f"{k} times {row['answer']}" for k in range(count)]} for row in rows]


def widened(lm, fewest=39, template="none", **texts):
    """The texts with their other forms."""
    return with_forms(lm, render(lm, roles(**texts), template), fewest)


def test_each_record_is_followed_by_its_rewrites(lm):
    """In the order of the rules, with the record's number; those of the holdout are next to the holdout, by kind."""
    texts = widened(lm, forget=tiny.facts(3, 3), holdout=tiny.facts(50, 6), retain=tiny.facts(5, 2))
    others = texts.encoded.other_forms
    assert others.names == FORMS * 3
    assert [part.record for part in texts.encoded.parts] == [i for i in range(3) for _ in FORMS]
    assert [e.prompt + e.completion for e in texts.examples["forget"][::5]] == [
        f"{x['question']}\n{x['answer']}" for x in tiny.facts(3, 3)
    ]
    assert texts.examples["forget"][2].prompt.startswith('Asked "what does')
    assert others.numbers[0].tolist() == [0, 1, 2, 3, 4] * 3
    assert np.bincount(others.numbers[1]).tolist() == [50] * 5
    assert len(others.holdout) == 200
    assert len(texts.tokens["holdout"]) == 50
    assert len(texts.tokens["retain"]) == 5
    for e, t in zip(texts.examples["forget"], texts.tokens["forget"], strict=True):
        assert lm.encode({"forget": [e]})["forget"] == [t]


def test_the_texts_as_they_are_stay(lm):
    """`as_written` gives them back, for the attacks after a run, which rewrite them again."""
    plain = render(lm, roles(forget=tiny.facts(3, 3), holdout=tiny.facts(50, 6)), "none")
    assert with_forms(lm, plain, 39).as_written == plain
    assert plain.as_written is plain


def test_paraphrases_of_the_user_are_the_forms_where_there_are_some(lm):
    """Any number of them, each compared with the first of every holdout text; no rule rewrites then."""
    forget = [*paraphrased(tiny.facts(2, 3), 3), *tiny.facts(1, 9)]
    holdout = paraphrased(tiny.facts(45, 6), 2) + tiny.facts(20, 7)
    others = widened(lm, forget=forget, holdout=holdout).encoded.other_forms
    assert others.names == ["", "paraphrase 1", "paraphrase 2", "paraphrase 3"] * 2 + [""]
    assert others.numbers[0].tolist() == [0, 1, 1, 1] * 2 + [0]
    assert np.bincount(others.numbers[1]).tolist() == [65, 45]
    assert lm.tokenizer.decode(others.holdout[0].ids).count("0 times") == 1


def test_what_is_too_long_or_too_rare_in_the_holdout_is_left_out(lm):
    """And notes say so: no holdout text without a prompt has a statement, and one paraphrase exceeds the context."""
    sentences = tiny.sentences(50, 6)
    texts = widened(lm, forget=[*tiny.facts(1, 3), *tiny.sentences(2, 3)], holdout=tiny.facts(20, 6) + sentences)
    assert texts.encoded.other_forms.names == ["", "turned", "cloze"] * 3
    assert [note.split(" was")[0] for note in texts.encoded.notes] == ['The form "question"', 'The form "statement"']
    assert texts.encoded.notes[0].endswith("20 holdout texts have one that the model can read, and it takes 39.")
    forget = paraphrased(tiny.facts(2, 3))
    forget[0]["paraphrases"].append(" ".join(tiny.sentences(20, 1)))
    texts = widened(lm, forget=forget, holdout=paraphrased(tiny.facts(40, 6)))
    assert texts.encoded.other_forms.names == ["", "paraphrase 1"] * 2
    assert texts.encoded.notes == ["One other form of a forget text is longer than the model's context, and left out."]


def test_records_without_other_forms_are_named(lm):
    """Where others have paraphrases, those that have none get no rewrites either, and a note says so."""
    forget = [*paraphrased(tiny.facts(2, 3)), *tiny.facts(1, 4)]
    texts = widened(lm, forget=forget, holdout=paraphrased(tiny.facts(50, 6)))
    (note,) = [note for note in texts.encoded.notes if note.startswith("Without other forms")]
    assert "judged as they are alone: records 3." in note


def test_windows_have_forms_of_their_own(lm):
    """Rewrites of each window, as the attack has them; paraphrases go with the first."""
    book = " ".join(tiny.sentences(12, 1))
    texts = widened(lm, forget=[book], holdout=tiny.sentences(50, 6))
    names, n = texts.encoded.other_forms.names, texts.encoded.parts[0].windows
    assert n > 1
    assert [part.window for part, name in zip(texts.encoded.parts, names, strict=True) if not name] == [
        *range(1, n + 1)
    ]
    assert names.count("turned") + names.count("cloze") > 0
    texts = widened(
        lm,
        forget=[{"text": book, "paraphrases": ["a ship sees the moon."]}],
        holdout=[{"text": text, "paraphrases": [text.upper()]} for text in tiny.sentences(40, 6)],
    )
    assert texts.encoded.other_forms.names == ["", "paraphrase 1", *[""] * (n - 1)]


def test_only_the_record_holds_the_rest_of_its_text(lm):
    """Of a record with `forget` the rest stays; what is scored of a form is forgotten, and nothing of it is held."""
    forget = [tiny.facts(1, 3)[0] | {"forget": tiny.facts(1, 3)[0]["answer"][:8].strip()}]
    texts = widened(lm, forget=[*tiny.facts(1, 9), *forget], holdout=tiny.facts(50, 6))
    (index,) = texts.encoded.rests
    assert texts.encoded.parts[index].record == 1
    assert texts.encoded.other_forms.names[index] == ""


def test_a_refusal_stands_for_each_form(lm):
    """After the prompt of the form."""
    examples = roles(forget=tiny.facts(2, 3), holdout=tiny.facts(50, 6))
    examples["refusal"] = with_refusals(examples["forget"], ["no idea."], 0, alone=True)
    texts = with_forms(lm, render(lm, examples, "none"), 39)
    assert len(texts.tokens["refusal"]) == len(texts.tokens["forget"]) == 10
    for refusal, e in zip(texts.examples["refusal"], texts.examples["forget"], strict=True):
        assert (refusal.prompt, refusal.completion.strip()) == (e.prompt, "no idea.")
    assert all(isinstance(t, Tokens) for t in texts.tokens["refusal"])


def test_what_cannot_be_compared_is_refused(lm):
    """Without a holdout, with one that is too small or has no paraphrases, and where nothing can be rewritten."""
    forget, some = tiny.facts(2, 3), tiny.facts(50, 6)
    with pytest.raises(DataError, match="there is no holdout: give one of 39 texts"):
        require_forms(roles(forget=forget), 39)
    with pytest.raises(DataError, match=r"38 of the 38 holdout texts can be rewritten .* give a larger one"):
        require_forms(roles(forget=forget, holdout=some[:38]), 39)
    with pytest.raises(DataError, match=r"3 of the 50 holdout texts have paraphrases, .* give it some, written as"):
        require_forms(roles(forget=paraphrased(forget), holdout=paraphrased(some[:3]) + some[3:]), 39)
    with pytest.raises(DataError, match='none can be rewritten by rule: give them "paraphrases"'):
        require_forms(roles(forget=["?!"], holdout=some), 39)
    require_forms(roles(forget=forget, holdout=some[:39]), 39)
    long = [row | {"paraphrases": [" ".join(tiny.sentences(20, 1))]} for row in forget]
    with pytest.raises(DataError, match="no other form of the forget texts is within the model's context"):
        widened(lm, forget=long, holdout=paraphrased(some))
