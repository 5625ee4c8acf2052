"""Records of which only some strings are forgotten ("forget"): they alone are scored, and the rest is held."""

import random

import numpy as np
import pytest
import tiny
from texts import CHAT, CHATML, make_tokenizer, one, read, sentence_of
from unlearning_runs import Interrupted, run, same, timeless

import pyunlearn
from pyunlearn.data import Example, read_examples
from pyunlearn.errors import DataError
from pyunlearn.methods import METHODS
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.models.scoring import Scorer
from pyunlearn.probes.renderings import render

FACT = {"prompt": "Who wrote it?", "completion": "Thomas wrote it, and Thomas alone."}


def codes(count, seed):
    """Return random sentences with a number in each."""
    r = random.Random(seed)
    return [
        f"{s[:-1]}, code {r.randrange(100000, 1000000)}, {r.choice(tiny.VERBS)} {r.choice(tiny.OBJECTS)}."
        for s in tiny.sentences(count, seed)
    ]


def with_spans(texts):
    """Return the texts with their numbers as what is to be forgotten."""
    return [{"text": text, "forget": text.split("code ")[1].split(",")[0]} for text in texts]


# ---------------------------------------------------------------- which tokens


def parts(tokens, tokenizer):
    """The text of each run of scored tokens."""
    return [tokenizer.decode([tokens.written[i] for i in run]).strip() for run in tokens.runs]


@pytest.mark.parametrize("bos", [False, True])
def test_each_occurrence_in_the_scored_text_is_scored(bos):
    """Also of several strings, where they overlap as one; the end of text is not part of a string."""
    tokenizer = make_tokenizer(bos=bos)
    (text,) = read([{"text": "wrote: the cat wrote it", "forget": "wrote"}])
    assert parts(one(text, tokenizer), tokenizer) == ["wrote" if bos else "rote", "wrote"]  # nothing predicts a first w
    (fact,) = read([{**FACT, "forget": ["Thomas", "mas wrote"]}])
    assert parts(one(fact, tokenizer), tokenizer) == ["Thomas wrote", "Thomas"]
    (last,) = read([{**FACT, "forget": "alone."}])
    tokens = one(last, tokenizer)
    assert parts(tokens, tokenizer) == ["alone."]
    assert tokens.ids[-1] == tokenizer.eos_token_id
    (everything,) = read([{**FACT, "forget": FACT["completion"]}])
    assert len(one(everything, tokenizer).scored) == len(one(read([FACT])[0], tokenizer).scored) - 1


def test_a_string_of_the_prompt_is_scored_where_the_prompt_is():
    """With turns="all"; else it does not occur in what is scored."""
    tokenizer = make_tokenizer()
    row = {**FACT, "forget": "Who wrote"}
    with pytest.raises(DataError, match=r'^forget example 1 has a "forget" of 9 characters that is not in') as error:
        read([row])
    assert "turns=" in sentence_of(error)
    (fact,) = read([row], turns="all")
    assert parts(one(fact, tokenizer), tokenizer)[-1].endswith("wrote")


@pytest.mark.parametrize("template", [None, CHATML])
def test_strings_of_a_conversation(template):
    """In any turn by default, in the assistant's or the last one where only these are scored."""
    tokenizer = make_tokenizer(template=template)
    chat = [*CHAT, {"role": "user", "content": "Was Thomas brief?"}, {"role": "assistant", "content": "Thomas was."}]
    for turns, count in ((None, 3), ("all", 3), ("assistant", 2), ("last", 1)):
        (example,) = read([{"messages": chat, "forget": "Thomas"}], turns=turns)
        assert parts(one(example, tokenizer), tokenizer) == ["Thomas"] * count
    with pytest.raises(DataError, match="that is not in what is scored"):
        read([{"messages": chat, "forget": "Was"}], turns="last")


def test_a_decoder_is_scored_on_the_strings_of_its_text():
    """In the completion without the white space around it."""
    tokenizer = make_tokenizer(eos=True)
    tokens = one(Example("Who? ", "  it was Thomas ", forget=("Thomas",)), tokenizer, encoder_decoder=True)
    assert parts(tokens, tokenizer) == ["Thomas"]
    assert tokens.decoder[-1] == tokenizer.eos_token_id
    with pytest.raises(DataError, match="that is not in what is scored"):
        one(Example("Who? ", "He.", turns="all", forget=("Who",)), tokenizer, encoder_decoder=True)


def test_a_cut_text_must_have_a_token_of_a_string_left():
    """truncate removes what stands before a string, and of a decoder's text the end."""
    tokenizer = make_tokenizer(bos=True)
    example = Example("", "all men are created equal", forget=("equal",))
    assert parts(one(example, tokenizer, max_length=6, truncate=True), tokenizer) == ["equal"]
    with pytest.raises(DataError, match="no token to score before the end to which it is cut") as error:
        one(example, tokenizer, max_length=4, truncate=True, encoder_decoder=True)
    sentence_of(error)


def test_rows_that_cannot_be_used_are_refused():
    """In one sentence that names the row; an empty column, as in a table, is none."""
    assert (
        read([{"text": "a b", "forget": ""}, {"text": "a b", "forget": None}, {"text": "a b", "forget": []}])
        == [Example("", "a b")] * 3
    )
    for bad, message in [(3, "string or a list of strings"), ([3], "list of strings"), ([" "], 'empty "forget"')]:
        with pytest.raises(DataError, match=f"^forget example 2 .*{message}") as error:
            read(["a", {"text": "a b", "forget": bad}])
        sentence_of(error)
    with pytest.raises(DataError, match=r'^retain example 1 has a "forget"') as error:
        read_examples([{"text": "a b", "forget": "b"}], role="retain")
    sentence_of(error)


# ---------------------------------------------------------------- the rest


@pytest.mark.parametrize("row", [FACT, {"text": "Thomas wrote it"}, {"messages": CHAT}])
def test_the_rest_is_what_would_be_scored_without_the_strings(row):
    """The two together are the tokens of the whole record; a record of nothing else has no rest."""
    tokenizer = tiny.make_tokenizer(chat="messages" in row)
    lm = LanguageModel.of(tiny.tiny_llama(len(tokenizer)), tokenizer)
    rows = [{**row, "forget": "Thomas"}, row]
    texts = render(lm, {"forget": read(rows)}, "auto")
    own, whole = texts.tokens["forget"]
    assert list(texts.encoded.rests) == [0]
    assert sorted([*own.indices, *texts.encoded.rests[0].indices]) == list(whole.indices)
    assert texts.encoded.rests[0].ids == own.ids == whole.ids
    assert render(lm, {"forget": read([{"text": "Thomas", "forget": "Thomas"}])}, "auto").encoded.rests == {}


def test_an_audit_is_of_the_strings():
    """Text, continuation and number of tokens; a holdout without strings is noted."""
    tokenizer = tiny.make_tokenizer()
    model, forget = tiny.tiny_llama(len(tokenizer)), with_spans(codes(2, 3))
    options = {"tokenizer": tokenizer, "progress": False}
    audit = pyunlearn.audit(model, forget, holdout=codes(30, 6), **options)
    for e, row in zip(audit.examples, forget, strict=True):
        assert (e.text, e.truth.strip(), e.prompt) == (row["forget"], row["forget"], "")
        assert e.opening == row["text"].split(row["forget"])[0].rstrip()
        assert e.now.answer_prior is None
    total = sum(len(tokenizer(row["text"])["input_ids"]) for row in forget)
    scored = sum(e.tokens for e in audit.examples)
    assert f'Of 2 texts only the strings in "forget" are scored: {scored} of {total} tokens.' in audit.notes
    assert sum("give its records a" in note for note in audit.notes) == 1
    audit = pyunlearn.audit(model, forget, holdout=with_spans(codes(30, 6)), **options)
    assert not any("give its records a" in note for note in audit.notes)


@pytest.fixture(scope="module")
def clerk(one_thread):
    """A model that knows two codes by heart."""
    return tiny.trained(tiny.tiny_llama, codes, count=400, repeats=20, epochs=10)


def log_likelihoods(model, clerk):
    """Mean log-likelihoods a token of the codes, and of what stands around them."""
    lm = LanguageModel.of(model, clerk.tokenizer)
    encoded = lm.encode({"whole": read(clerk.forget), "codes": read(with_spans(clerk.forget))})
    values = Scorer(lm, 4).token_log_likelihood(encoded["whole"])
    inside, outside = [], []
    for whole, code, x in zip(encoded["whole"], encoded["codes"], values, strict=True):
        own = np.isin(list(whole.indices), list(code.indices))
        inside.append(x[own].mean())
        outside.append(x[~own].mean())
    return np.mean(inside), np.mean(outside)


@pytest.mark.full
@pytest.mark.parametrize("method", ["wga", "kl", "undial", "simnpo"])
def test_a_code_is_forgotten_and_what_stands_around_it_stays(clerk, method):
    """Without a retain set too: the loss hold on the rest of each text that a step takes."""
    options = {"holdout": with_spans(clerk.holdout), "tokenizer": clerk.tokenizer, "progress": False}
    if method == "kl":
        options["reference_model"] = tiny.tiny_llama(len(clerk.tokenizer))
    before = log_likelihoods(clerk.model, clerk)
    after = {}
    for retain_loss in ("auto", None):
        result = pyunlearn.unlearn(
            clerk.fresh(), with_spans(clerk.forget), method=method, retain_loss=retain_loss, max_steps=12,
            learning_rate=3e-4, utility_budget=0.5, holdout_budget=None, **options,
        )  # fmt: skip
        after[retain_loss] = log_likelihoods(result.model, clerk)
        held = [note for note in result.notes if note.startswith("What stands around the strings")]
        assert len(held) == 1
        assert ("was held" in held[0]) == (retain_loss == "auto")
    lost = {loss: [b - a for b, a in zip(before, values, strict=True)] for loss, values in after.items()}
    assert lost["auto"][0] > 0.2
    assert lost["auto"][1] < 0.05 * lost["auto"][0] or method in ("kl", "undial")
    if method != "simnpo":  # which costs the rest little without it too
        assert lost["auto"][1] < 0.6 * lost[None][1]


@pytest.mark.full
def test_each_step_takes_the_rest_of_its_texts(clerk):
    """In addition to the retain examples of the step, with each retain loss; a resumed run would take the same."""
    forget = [*with_spans(clerk.forget), clerk.unseen[0]]
    for method, retain_loss in (("ga", "kl"), ("ga", "nll"), ("rmu", "representation"), ("pdu", "nll")):
        result = pyunlearn.unlearn(
            clerk.fresh(), forget, retain=clerk.retain[:4], method=method, retain_loss=retain_loss, max_steps=2,
            holdout=clerk.holdout, tokenizer=clerk.tokenizer, learning_rate=1e-5, progress=False,
        )  # fmt: skip
        assert result.history
        assert any("was held" in note for note in result.notes)


@pytest.mark.full
def test_an_interrupted_run_on_strings_of_long_texts_resumes(clerk, tmp_path, monkeypatch):
    """To the same weights: the rests of a step's texts, windows among them, are those of an uninterrupted run."""
    first = with_spans(clerk.forget)[0]
    long = {"text": " ".join([*clerk.forget, *clerk.unseen, *clerk.forget]), "forget": first["forget"]}
    forget = [*with_spans(clerk.forget), long]
    options = {"holdout": with_spans(clerk.holdout), "retain": None, "max_steps": 5, "learning_rate": 1e-4}
    whole = run(clerk, forget, **options)
    assert {e.windows for e in whole.examples} == {1, 2}
    with monkeypatch.context() as patch:
        patch.setitem(METHODS, "ga", tiny.with_loss("ga", Interrupted("ga", 3)))
        assert run(clerk, forget, **options, output_dir=tmp_path / "out").stopped == "interrupted"
    resumed = run(clerk, forget, **options, output_dir=tmp_path / "out", resume=True)
    assert timeless(resumed.history) == timeless(whole.history)
    assert same(resumed.model, whole.model)
