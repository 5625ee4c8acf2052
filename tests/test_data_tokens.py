"""Tokens: what a model reads of an example, and which of its tokens are scored."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import CHAT, CHATML, SENTENCES, make_tokenizer, one, read, sentence_of

from pyunlearn.data import Example, Tokens, encode, padding_id, tokens
from pyunlearn.data.examples import TURNS
from pyunlearn.errors import ArgumentError, DataError


@pytest.fixture(scope="module")
def plain():
    return make_tokenizer()


@pytest.fixture(scope="module")
def with_bos():
    return make_tokenizer(bos=True)


def test_a_plain_text_is_scored_from_its_first_token_with_bos_and_else_from_its_second(plain, with_bos):
    """Nothing predicts the first token of a text without BOS, and a fragment has no end to be scored."""
    ids = plain(SENTENCES[0])["input_ids"]
    assert one(Example("", SENTENCES[0]), plain) == Tokens(tuple(ids), 1)
    assert one(Example("", SENTENCES[0]), with_bos) == Tokens((0, *ids), 1)
    assert one(Example("", SENTENCES[0]), make_tokenizer(bos=True, eos=True)) == Tokens((0, *ids), 1)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_an_answer_ends_with_one_end_of_text(bos, eos):
    """Whether or not the tokenizer adds it by itself, or the text has it already."""
    tokenizer = make_tokenizer(bos=bos, eos=eos)
    for completion in ("Thomas Jefferson", "Thomas Jefferson</s>"):
        tokens = one(Example("who wrote it? ", completion), tokenizer)
        assert tokens.ids.count(1) == 1
        assert tokens.ids.count(0) == bos
        assert tokenizer.decode(tokens.scored) == " Thomas Jefferson</s>"
    assert one(Example("who ", "wrote"), make_tokenizer(eos_token=None)).ids[-1] != 1


def test_many_texts_are_tokenized_as_each_alone(plain, monkeypatch):
    """In parts of three."""
    examples = [Example("", sentence) for sentence in SENTENCES * 3]
    alone = [one(example, plain) for example in examples]
    monkeypatch.setattr(tokens, "_AT_ONCE", 3)
    assert encode(examples, plain, role="forget", max_length=None) == alone


words = st.text(alphabet=st.sampled_from("ab e.\n\té蓝🙂'1"), min_size=1, max_size=12).filter(str.strip)


@pytest.mark.parametrize("slow", [False, True])
@settings(deadline=None, max_examples=50)
@given(prompt=words, completion=words)
def test_the_seam_is_exact(plain, slow, prompt, completion):
    """The ids are the whole text's, and scored are the tokens that end in the completion, counted in bytes.

    Without offsets, a token or two before the seam may be scored as well, and never one too few.
    """
    ids = plain(prompt + completion)["input_ids"]
    ends = list(itertools.accumulate(len(token) for token in plain.convert_ids_to_tokens(ids)))  # a character a byte
    assert ends[-1] == len((prompt + completion).encode())
    seam = max(1, sum(end <= len(prompt.encode()) for end in ends))
    tokens = one(Example(prompt, completion), Slow(plain) if slow else plain)
    assert tokens.ids == (*ids, 1)
    assert tokens.first <= seam if slow else tokens.first == seam


class Slow:
    """A tokenizer without offsets."""

    is_fast = False

    def __init__(self, fast):
        self._fast = fast

    def __call__(self, text, return_offsets_mapping=False, **options):
        assert not return_offsets_mapping
        return self._fast(text, **options)

    def __getattr__(self, name):
        return getattr(self._fast, name)


class BrokenOffsets(Slow):
    """A fast tokenizer whose offsets are all empty, as some versions of some had them."""

    is_fast = True

    def __call__(self, text, return_offsets_mapping=False, **options):
        out = self._fast(text, **options)
        if return_offsets_mapping:
            out["offset_mapping"] = [[(0, 0) for _ in ids] for ids in out["input_ids"]]
        return out


@pytest.mark.parametrize("wrap", [lambda tokenizer: tokenizer, Slow, BrokenOffsets])
def test_a_token_that_reaches_over_the_seam_is_scored(plain, wrap):
    """ "truths" is one token: cut inside it, the whole of it belongs to the completion."""
    assert len(plain(" truths")["input_ids"]) == 1
    tokens = one(Example("We hold these tru", "ths to be"), wrap(plain))
    assert plain.decode(tokens.scored) == " truths to be</s>"
    assert plain.decode(tokens.ids[: tokens.first]) == "We hold these"


@pytest.mark.parametrize("bos", [False, True])
def test_a_chat_template_writes_the_special_tokens_and_the_last_turn_is_scored(bos):
    """Up to its closing token; no BOS or end of text comes from us, and no newline after it is scored."""
    tokenizer = make_tokenizer(bos=bos, template=CHATML)
    (example,) = read([{"messages": CHAT}], turns="last")
    tokens = one(example, tokenizer)
    assert tokenizer.decode(tokens.scored) == "Thomas Jefferson.<|im_end|>"
    assert tokenizer.decode(tokens.ids).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")
    assert tokenizer.decode(tokens.ids[: tokens.first]).endswith("<|im_start|>assistant\n")
    (question,) = read([{"question": "Who wrote it?", "answer": "Thomas Jefferson."}])
    assert one(question, tokenizer).scored == tokens.scored


def test_without_a_chat_template_a_chat_is_lines(plain):
    """role: content, and only the answer is scored, with the end of text."""
    tokens = one(read([{"messages": CHAT}], turns="last")[0], plain)
    assert plain.decode(tokens.ids) == "system: Be brief.\nuser: Who wrote it?\nassistant: Thomas Jefferson.</s>"
    assert plain.decode(tokens.scored) == " Thomas Jefferson.</s>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages | length }}: {{ messages[-1]['content'] }}", "cannot be split into prompt and answer"),
        ("{{ raise_exception('roles must alternate') }}", "is refused by the tokenizer's chat template: roles must"),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_refused(template, message):
    """Scored tokens that cannot be told from the prompt's are an error, and so is a template that raises."""
    with pytest.raises(DataError, match=message) as error:
        one(read([{"messages": CHAT}], turns="last")[0], make_tokenizer(template=template))
    assert "give it as prompt and completion" in sentence_of(error)


LONG_CHAT = [*CHAT, {"role": "user", "content": "assistant"}, {"role": "assistant", "content": "In July."}]
QWEN = (  # removes the thoughts of earlier turns, so that no earlier text is the beginning of a later one
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}<think></think>"
    "{% endif %}{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("template", [None, CHATML, QWEN])
@pytest.mark.parametrize("wrap", [lambda tokenizer: tokenizer, lambda tokenizer: Slow(tokenizer)])
def test_a_conversation_is_scored_by_turns(template, wrap):
    """All from the first turn's content on, the assistant's turns with the token that closes them, or the last."""
    tokenizer = wrap(make_tokenizer(template=template))
    tokens = {turns: one(read([{"messages": LONG_CHAT}], turns=turns)[0], tokenizer) for turns in (None, *TURNS)}
    assert tokens[None] == tokens["all"]
    assert len({t.ids for t in tokens.values()}) == 1
    (whole,) = tokens["all"].runs
    assert tokenizer.decode(tokens["all"].ids[: whole.start]).strip() == (
        "<|im_start|>system" if template else "system:"
    )
    assert whole.stop == len(tokens["all"].ids)
    end = "<|im_end|>" if template else ""
    parts = [tokenizer.decode([tokens["assistant"].ids[i] for i in run]) for run in tokens["assistant"].runs]
    assert [part.strip() for part in parts] == [f"Thomas Jefferson.{end}", f"In July.{end or '</s>'}"]
    last = tokenizer.decode(tokens["last"].scored).removeprefix("<think></think>")
    assert last.strip() == f"In July.{end or '</s>'}"


@pytest.mark.parametrize("template", ["{{ messages | length }}", "<s>{{ messages[0]['role'] }}"])
def test_a_chat_template_that_leaves_the_messages_out_is_refused(template):
    """There is nothing of theirs that could be scored."""
    for turns in ("all", "assistant"):
        with pytest.raises(DataError, match="has no turn to score") as error:
            one(read([{"messages": CHAT}], turns=turns)[0], make_tokenizer(template=template))
        sentence_of(error)


def test_a_prompt_is_scored_too_where_all_is_wanted(plain, with_bos):
    """From the first token that something predicts, to the end of text."""
    for tokenizer in (plain, with_bos):
        (pair,) = read([{"prompt": "Who wrote it?", "completion": "He."}], turns="all")
        assert tokenizer.decode(one(pair, tokenizer).ids).endswith("Who wrote it? He.</s>")
        assert one(pair, tokenizer).first == 1
        (text,) = read(["all men"], turns="all")
        assert one(text, tokenizer) == one(Example("", "all men"), tokenizer)
        (assistant,) = read([{"prompt": "Who wrote it?", "completion": "He."}], turns="assistant")
        assert one(assistant, tokenizer) == one(Example("Who wrote it? ", "He."), tokenizer)


@pytest.mark.parametrize("wrap", [lambda tokenizer: tokenizer, Slow, BrokenOffsets])
@settings(deadline=None, max_examples=40)
@given(parts=st.lists(words, min_size=2, max_size=5), data=st.data())
def test_the_tokens_that_reach_into_a_span_are_scored(with_bos, wrap, parts, data):
    """Each character of a span is in a scored token; with offsets, each scored token has one of them."""
    text = "".join(parts)
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    tokens = one(Example("", text, spans=((start, end),)), wrap(with_bos))
    pieces = with_bos.convert_ids_to_tokens(tokens.ids[1:])  # a character a byte
    ends = [0, *itertools.accumulate(map(len, pieces))]
    first, last = len(text[:start].encode()), len(text[:end].encode())
    touched = [i + 1 for i in range(len(pieces)) if ends[i] < last and ends[i + 1] > first]
    assert set(touched) <= set(tokens.indices)
    if wrap not in (Slow, BrokenOffsets):
        assert touched == list(tokens.indices)


def test_scored_tokens_are_runs():
    """With gaps, and without any where the indices have none."""
    gaps = Tokens.at((5, 6, 7, 8, 9, 4), [1, 2, 4])
    assert (gaps.scored, gaps.runs, list(gaps.indices)) == ((6, 7, 9), [range(1, 3), range(4, 5)], [1, 2, 4])
    whole = Tokens.at((5, 6, 7), [1, 2])
    assert (whole, whole.runs) == (Tokens((5, 6, 7), 1), [range(1, 3)])
    for bad in ([], [0, 1], [2, 1], [1, 1], [1, 9]):
        with pytest.raises(DataError):
            Tokens.at((5, 6, 7, 8), bad)
    with pytest.raises(DataError, match="increasing"):
        Tokens((5, 6, 7, 8), 1, None, (1, 9))


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_an_encoder_reads_the_prompt_and_the_decoder_writes_the_completion(bos, eos):
    """As T5's and BART's tokenizers make them; what stands before the decoder's text is read and not scored."""
    tokenizer = make_tokenizer(bos=bos, eos=eos)
    tokens = one(Example("who wrote it? ", " Thomas"), tokenizer, encoder_decoder=True)
    assert tokens.ids == tuple(tokenizer("who wrote it?")["input_ids"])
    assert tokens.first == bos
    assert tokens.decoder[: tokens.first] == (0,) * bos
    assert tokens.scored == (*tokenizer("Thomas", add_special_tokens=False)["input_ids"], 1)


def test_a_plain_text_gives_the_encoder_the_end_of_text_alone():
    """An encoder cannot read nothing, and the decoder is scored on the whole text."""
    text, ids = Example("", "created equal"), make_tokenizer()("created equal")["input_ids"]
    for tokenizer in (make_tokenizer(), make_tokenizer(eos=True), make_tokenizer(pad_token="<s>")):
        assert one(text, tokenizer, encoder_decoder=True) == Tokens((1,), 0, (*ids, 1))
    endless = make_tokenizer(eos_token=None, pad_token="<s>")
    assert one(text, endless, encoder_decoder=True) == Tokens((0,), 0, tuple(ids))


def test_an_example_longer_than_the_limit_is_named_with_its_length(plain):
    """Number, length, limit and the mend, in one sentence; for the encoder and for the decoder as well."""
    short, long = Example("", "all men"), Example("who ", SENTENCES[0])
    length = len(one(long, plain).ids)
    with pytest.raises(DataError, match=f"holdout example 2 has {length} tokens where the limit is 9") as error:
        encode([short, long], plain, role="holdout", max_length=9)
    assert "truncate=True (--truncate)" in sentence_of(error)
    assert len(one(long, plain, max_length=length)) == length
    for pair in (Example(SENTENCES[0], "who"), Example("who", SENTENCES[0])):
        with pytest.raises(DataError, match="where the limit is 9"):
            one(pair, plain, max_length=9, encoder_decoder=True)


@pytest.mark.parametrize("encoder_decoder", [False, True])
@settings(deadline=None, max_examples=50)
@given(prompt=st.integers(0, 12), completion=st.integers(1, 12), limit=st.integers(2, 10), bos=st.booleans())
def test_a_truncated_example_fits_and_keeps_bos_and_a_scored_token(
    plain, with_bos, encoder_decoder, prompt, completion, limit, bos
):
    """The prompt loses its beginning, the completion its end, and both only as far as they must."""
    tokenizer = with_bos if bos else plain
    example = Example("".join("abcdefghijklm"[:prompt]), "\n".join("nopqrstuvwxyz"[:completion]))
    if not prompt and not bos and completion == 1 and not encoder_decoder:
        return
    options = {"encoder_decoder": encoder_decoder}
    whole, cut = one(example, tokenizer, **options), one(
        example, tokenizer, **options, max_length=limit, truncate=True
    )  # fmt: skip
    parts = (cut.ids, cut.decoder) if encoder_decoder else (cut.ids,)
    assert all(len(part) <= limit for part in parts)
    assert cut.scored == whole.scored[: len(cut.scored)]
    if not encoder_decoder:
        if len(whole) > limit:
            assert len(cut) == limit
        assert cut.first >= min(whole.first, limit // 2)
        if len(cut.scored) < len(whole.scored):
            assert cut.first <= max(1, limit // 2)
        if bos and cut.first > 1:
            assert cut.ids[0] == 0
            assert cut.ids[1 : cut.first] == whole.ids[1 + whole.first - cut.first : whole.first]
        else:
            assert cut.ids[: cut.first] == whole.ids[whole.first - cut.first : whole.first]


def test_an_example_without_a_token_to_score_is_refused(plain):
    """One token that nothing predicts, text of which the tokenizer makes nothing, and Tokens made by hand."""
    with pytest.raises(DataError, match="forget example 1 has no token to score: it is one token") as error:
        one(Example("", "a"), plain)
    sentence_of(error)
    for encoder_decoder in (False, True):
        with pytest.raises(DataError, match="the tokenizer makes none of it"):
            one(Example("a", ""), plain, encoder_decoder=encoder_decoder)
    for bad in ((1, 2), 0, None), ((1, 2), 2, None), ((), 0, (1,)), ((1,), 1, (2,)):
        with pytest.raises(DataError, match="no token is scored"):
            Tokens(*bad)
    with pytest.raises(ArgumentError, match="max_length must be at least 2"):
        one(Example("", "all men"), plain, max_length=1)


def test_a_text_is_not_quoted(plain):
    """An error names an example by its number, since it may end up in a log."""
    with pytest.raises(DataError, match="example 1 has") as error:
        one(Example("", SENTENCES[0]), plain, max_length=2)
    assert not any(word in str(error.value) for word in SENTENCES[0].split() if len(word) > 4)


def test_special_tokens_alone_are_no_text(plain):
    """The model was never asked to learn them as text, so a verdict would say nothing."""
    with pytest.raises(DataError, match="example 1 has no token to score: it is made of special tokens alone"):
        one(Example("", "<|im_end|><|im_end|>"), plain)


def test_no_examples_are_no_tokens(plain):
    """A missing retain set is not an error here."""
    assert encode([], plain, role="retain", max_length=8) == []


def test_padding_id_is_pad_or_end_of_text_or_zero(plain):
    """A tokenizer without a pad token is no obstacle."""
    assert padding_id(make_tokenizer(pad_token="<|im_end|>")) == 3
    assert padding_id(plain) == 1
    assert padding_id(make_tokenizer(eos_token=None)) == 0
