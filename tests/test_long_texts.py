"""Texts longer than the model's context: windows, with a verdict on each and on the whole; or a cut that is noted."""

import io
import json

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import CHAT, read

import pyunlearn
from pyunlearn.data import Tokens
from pyunlearn.data.windows import OVERLAP, windows_of
from pyunlearn.edits import first_order_influence
from pyunlearn.errors import DataError
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.models.scoring import Scorer
from pyunlearn.probes.long_texts import SHORT, document_verdict, encode_texts
from pyunlearn.probes.renderings import render
from pyunlearn.report import audit_page

FAST = {"metrics": ["membership"], "progress": False}


# ---------------------------------------------------------------- windows


@settings(deadline=None, max_examples=300)
@given(
    length=st.integers(2, 120), limit=st.integers(2, 40), first=st.integers(1, 119), bos=st.booleans(), data=st.data()
)
def test_each_scored_token_is_scored_once_after_context(length, limit, first, bos, data):
    """In a window that fits, of the tokens that precede it in the text; shares of a whole text are even."""
    first = min(first, length - 1)
    ids = (0 if bos else 7, *range(10, 9 + length))
    gaps = data.draw(st.booleans())
    indices = range(first, length)
    if gaps:
        indices = sorted(data.draw(st.sets(st.sampled_from(indices), min_size=1)))
    t = Tokens.at(ids, indices)
    windows = windows_of(t, limit, 0)
    if length <= limit:
        assert [w.tokens for w in windows] == [t]
        return
    assert [w.source[i] for w in windows for i in w.tokens.indices] == list(t.indices)
    repeats = bos and limit >= 16
    for w in windows:
        assert len(w.tokens.ids) <= limit
        assert w.tokens.ids == tuple(ids[i] for i in w.source)
        inner = w.source[repeats:]
        assert list(inner) == list(range(inner[0], inner[-1] + 1))
        assert not repeats or w.source[0] == 0
        room = limit - repeats
        context = w.source[w.tokens.first] - inner[0]
        assert inner[0] == int(repeats) or context >= max(1, room // OVERLAP)
    if not gaps:
        sizes = [len(w.tokens.scored) for w in windows]
        assert max(sizes) - min(sizes) <= 1


def test_texts_that_fit_are_one_window():
    """As are those of a model without a limit, and of a decoder."""
    t = Tokens((5, 6, 7, 8), 2)
    for limit in (4, 9, None):
        assert [(w.tokens, list(w.source)) for w in windows_of(t, limit)] == [(t, [0, 1, 2, 3])]
    both = Tokens((5, 6, 7, 8), 0, (1, 2, 3))
    assert [w.tokens for w in windows_of(both, 2)] == [both]


def test_a_long_prompt_is_context_as_far_as_it_fits():
    """Its answer is one window with what stands right before it."""
    t = Tokens(tuple(range(50)), first=45)
    (window,) = windows_of(t, 20)
    assert (window.tokens.ids, window.tokens.scored) == (tuple(range(30, 50)), tuple(range(45, 50)))


@pytest.mark.parametrize(
    ("verdicts", "verdict"),
    [
        (["forgotten", "still exposed", "over-unlearned"], "still exposed"),
        (["forgotten", "over-unlearned"], "over-unlearned"),
        (["not memorized", "forgotten"], "forgotten"),
        (["not memorized", "no likelier"], "no likelier"),
        (["not memorized"] * 3, "not memorized"),
    ],
)
def test_a_whole_text_has_the_worst_verdict_of_its_windows(verdicts, verdict):
    """It is forgotten only where every memorized window is."""
    assert document_verdict(verdicts) == document_verdict(verdicts[::-1]) == verdict


# ---------------------------------------------------------------- texts by role


@pytest.fixture(scope="module")
def small():
    """A model that has learned nothing, with 96 positions."""
    tokenizer = tiny.make_tokenizer()
    return LanguageModel.of(tiny.tiny_llama(len(tokenizer)).eval(), tokenizer)


def long_text(seed, count=20):
    """Return sentences that are longer than 96 tokens together."""
    return " ".join(tiny.sentences(count, seed))


def test_every_token_of_every_role_is_read(small):
    """Of forget set, retain set and holdout; a refusal stands for each window of the text that it answers."""
    rows = ["a ship sees the moon.", long_text(1), "one boy sells a lamp."]
    refusals = [{"prompt": "what?", "completion": word} for word in ("no", "never", "nothing")]
    texts = {"forget": read(rows), "retain": read(rows[:2]), "refusal": read(refusals)}
    encoded = encode_texts(small, texts)
    n = encoded.parts[1].windows
    assert n > 2
    assert [tuple(p) for p in encoded.parts] == [(0, 1, 1), *((1, k, n) for k in range(1, n + 1)), (2, 1, 1)]
    assert {role: len(tokens) for role, tokens in encoded.tokens.items()} == {
        "forget": n + 2, "retain": n + 1, "refusal": n + 2,
    }  # fmt: skip
    for role, tokens in encoded.tokens.items():
        assert len(encoded.examples[role]) == len(tokens)
    whole = small.tokenizer(rows[1])["input_ids"]
    assert [i for t in encoded.tokens["forget"][1:-1] for i in t.scored] == whole[1:]
    assert "".join(e.completion for e in encoded.examples["forget"][1:-1]) == rows[1]
    alone = small.encode({"x": texts["refusal"]})["x"]
    assert encoded.tokens["refusal"] == [alone[0], *[alone[1]] * n, alone[2]]
    (note,) = encoded.notes
    assert f"1 forget text in {n} windows, 1 retain text in {n} windows" in note
    assert encode_texts(small, {"forget": texts["forget"][:1], "holdout": texts["forget"][2:]}).notes == []


def test_windows_without_a_holdout_are_short(small):
    """As the texts are that they are compared with; those of the retain set are not, nor is a text that fits."""
    fits, long = long_text(3, 6), long_text(1)
    assert 64 < len(small.tokenizer(fits)["input_ids"]) <= 96
    texts = render(small, {"forget": read([fits, long]), "retain": read([long])}, "auto")
    lengths = [len(t.ids) for t in texts.tokens["forget"]]
    assert lengths[0] == len(small.tokenizer(fits)["input_ids"])
    assert max(lengths[1:]) == SHORT == 64
    assert max(len(t.ids) for t in texts.tokens["retain"]) == 96
    assert texts.notes(memorized=True)[1].startswith("Without a holdout the windows of forget texts have 64 tokens")
    texts = render(small, {"forget": read([long]), "holdout": read([fits])}, "auto")
    assert max(len(t.ids) for t in texts.tokens["forget"]) == 96
    assert len(texts.notes(memorized=True)) == 1


def test_what_truncate_cuts_off_is_counted(small):
    """In tokens, by role."""
    texts = {"forget": read(["a lamp", long_text(1)]), "retain": read([long_text(2)])}
    encoded = encode_texts(small, texts, truncate=True)
    lengths = [len(small.tokenizer(text)["input_ids"]) for text in ("a lamp", long_text(1), long_text(2))]
    assert [len(t.ids) for t in encoded.tokens["forget"]] == [lengths[0], 96]
    (note,) = encoded.notes
    assert f"{lengths[1] - 96} of {lengths[0] + lengths[1]} tokens in 1 forget text" in note
    assert f"{lengths[2] - 96} of {lengths[2]} tokens in 1 retain text" in note


def test_tokens_that_are_in_no_window_are_counted(small):
    """Of a long prompt, and of a text of which one string far back is scored, which is held with what stands around."""
    text = long_text(1) + " the code is 4711."
    rows = [{"prompt": long_text(2), "completion": "a lamp"}, {"text": text, "forget": "4711"}]
    encoded = encode_texts(small, {"forget": read(rows), "holdout": read(["a lamp"])})
    assert [tuple(p) for p in encoded.parts] == [(0, 1, 1), (1, 1, 1)]
    unread = sum(len(whole.ids) - 96 for whole in encoded.whole)
    assert encoded.notes[1].startswith(f"{unread} tokens of these texts were not read")
    code, rest = encoded.tokens["forget"][1], encoded.rests[1]
    assert small.tokenizer.decode(code.scored).strip() == "4711"
    assert sorted([*code.indices, *rest.indices]) == list(range(1, 96))
    assert rest.ids == code.ids


def test_a_long_conversation_is_read_in_windows(small):
    """Each turn of it is scored in one of them."""
    chat = [
        *CHAT[:2],
        {"role": "assistant", "content": long_text(1)},
        *CHAT[1:2],
        {"role": "assistant", "content": "No."},
    ]
    for turns in ("all", "assistant"):
        encoded = encode_texts(small, {"forget": read([{"messages": chat}], turns=turns)})
        whole = encoded.whole[0]
        assert [i for t in encoded.tokens["forget"] for i in t.scored] == list(whole.scored)
        assert not any(e.prompted for e in encoded.examples["forget"])
        assert len(encoded.parts) > 2


def test_an_encoder_decoder_refuses_what_does_not_fit():
    """It has no windows: the message names truncate."""
    tokenizer = tiny.make_tokenizer(form="$A </s>")
    model = tiny.tiny_t5(len(tokenizer))
    model.config.max_position_embeddings = model.config.n_positions = 32
    lm = LanguageModel.of(model, tokenizer)
    if lm.context_length is None:
        assert len(encode_texts(lm, {"forget": read([long_text(1)])}).parts) == 1
        return
    with pytest.raises(DataError, match="--truncate"):
        encode_texts(lm, {"forget": read([long_text(1)])})


# ---------------------------------------------------------------- from end to end


def test_each_window_has_a_row_and_the_text_a_verdict(small):
    """In the audit, its JSON and its notes; numbers of the record with that of the window."""
    rows = ["a ship sees the moon.", long_text(1)]
    audit = pyunlearn.audit(small.module, rows, holdout=tiny.sentences(30, 6), tokenizer=small.tokenizer, **FAST)
    n = len(audit.examples) - 1
    assert [e.label for e in audit.examples] == ["1", *(f"2 ({k}/{n})" for k in range(1, n + 1))]
    assert "".join(e.text for e in audit.examples[1:]) == rows[1]
    (document,) = audit.documents
    assert (document.record, document.windows, document.verdict) == (1, n, "not memorized")
    assert document.verdicts == {"not memorized": n}
    assert audit.to_dict()["documents"] == [
        {"record": 1, "windows": n, "verdict": "not memorized", "verdicts": {"not memorized": n}, "forms": 0}
    ]
    assert f"Text 2 as a whole: not memorized, as {n} of its {n} windows." in audit.notes
    assert sum(note.startswith("Longer than the 96 tokens") for note in audit.notes) == 1
    page = audit_page(audit, show_text=True)
    assert all(f"<td>2 ({k}/{n})</td>" in page for k in range(1, n + 1))


@pytest.mark.full
@pytest.mark.parametrize("role", ["forget", "retain", "holdout"])
def test_a_run_reads_windows_of_each_role(small, role):
    """And ends as it does with short texts."""
    texts = {"forget": tiny.sentences(2, 3), "retain": tiny.sentences(8, 2), "holdout": tiny.sentences(30, 6)}
    texts[role] = [*texts[role], long_text(9)]
    result = pyunlearn.unlearn(small.module, tokenizer=small.tokenizer, max_steps=1, progress=False, **texts)
    assert any(f"1 {role} text in " in note for note in result.notes)
    assert len(result.documents) == (role == "forget")


def pages(count, seed):
    """Return texts of four sentences."""
    return [" ".join(tiny.sentences(4, seed * 1000 + i)) for i in range(count)]


@pytest.fixture(scope="module")
def reciter(one_thread):
    """A model that knows two pages by heart."""
    return tiny.trained(tiny.tiny_llama, pages, count=200, repeats=40, epochs=12)


@pytest.mark.full
def test_a_memorized_page_of_a_long_text_is_found_and_forgotten(reciter):
    """Its windows are still exposed and so is the text; afterwards both are forgotten."""
    book = " ".join([*reciter.forget, *pages(3, 32)])
    options = {"holdout": pages(60, 6), "tokenizer": reciter.tokenizer}
    audit = pyunlearn.audit(reciter.model, [book], **options, **FAST)
    exposed = [e for e in audit.examples if e.verdict == "still exposed"]
    assert exposed
    assert len(exposed) < len(audit.examples)
    assert [e.window for e in exposed] == list(range(1, len(exposed) + 1))  # the pages stand at its beginning
    assert audit.documents[0].verdict == "still exposed"
    result = pyunlearn.unlearn(
        reciter.fresh(),
        [book],
        retain=reciter.corpus,
        learning_rate=3e-4,
        progress=False,
        utility_budget=0.2,
        **options,
    )
    assert {e.record for e in result.examples} == {0}
    assert result.documents[0].windows == len(result.examples) == len(audit.examples)
    assert result.documents[0].verdict == "forgotten"
    assert result.forgotten


@pytest.mark.slow
@pytest.mark.full
def test_a_book_of_100_000_words_is_audited_and_unlearned(small, tmp_path):
    """Every token of it is scored, in time that grows with its length alone."""
    book = " ".join(tiny.sentences(9100, 5))
    assert len(book.split()) > 100_000
    options = {"holdout": [long_text(seed, 4) for seed in range(40, 70)], "tokenizer": small.tokenizer}
    audit = pyunlearn.audit(small.module, [book], **options, **FAST)
    assert sum(e.tokens for e in audit.examples) == len(small.tokenizer(book)["input_ids"]) - 1
    assert audit.documents[0].windows == len(audit.examples) > 1000
    result = pyunlearn.unlearn(
        small.module, [book], max_steps=1, progress=False, output_dir=tmp_path / "new", **options
    )
    written = json.loads((tmp_path / "new" / "result.json").read_text())
    assert written["documents"][0]["windows"] == len(result.examples) == len(audit.examples)


def test_an_edit_reads_windows_and_warns_of_what_it_cuts(small):
    """The negative log-likelihood is over the tokens of all windows; truncate leaves some out, which a note counts."""
    options = {"tokenizer": small.tokenizer, "rate": 1e-6, "progress": False}
    with pytest.warns(UserWarning, match="1 forget text in 2 windows"):
        edited = first_order_influence(small.module, [long_text(1, 12)], **options)
    whole = small.encode({"x": read([long_text(1, 12)])}, limited=False)["x"][0]
    windows = [w.tokens for w in windows_of(whole, 96, small.tokenizer.bos_token_id)]
    each = np.concatenate(Scorer(small, 4).token_log_likelihood(windows))
    assert edited.nll_before["forget"] == pytest.approx(-float(each.mean()), rel=1e-5)
    edited.undo()
    with pytest.warns(UserWarning, match="^Not looked at, since truncate cuts"):
        first_order_influence(small.module, [long_text(1, 12)], truncate=True, **options).undo()


def test_tables_show_the_window(small):
    """Of a run, in the column of numbers."""
    from rich.console import Console

    from pyunlearn.report import result_table

    result = pyunlearn.unlearn(
        small.module,
        [long_text(1)],
        holdout=tiny.sentences(30, 6),
        tokenizer=small.tokenizer,
        max_steps=0,
        progress=False,
    )
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(result_table(result, names=["the book"]))
    shown = console.export_text()
    n = len(result.examples)
    assert all(f"1 ({k}/{n})" in shown for k in range(1, n + 1))
    assert shown.count("the book") == n
