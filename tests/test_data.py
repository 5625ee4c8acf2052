"""What a user may give as text, how it becomes tokens, and which of them are scored."""

import builtins
import csv
import itertools
import json
import os
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from pyunlearn import errors
from pyunlearn.data import Example, Message, TokenBatch, Tokens, batches, collate, encode, padding_id, read_examples
from pyunlearn.errors import ArgumentError, DataError, DependencyError, PyunlearnError, nearest

SENTENCES = [
    "We hold these truths to be self-evident, that all men are created equal.",
    "Question: who wrote it? Answer: Thomas Jefferson wrote it in 1776.",
    "user: assistant: system: the quick brown fox jumps over the lazy dog",
]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who wrote it?"},
    {"role": "assistant", "content": "Thomas Jefferson."},
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(*, bos=False, eos=False, template=None, **special):
    """A real byte-level BPE tokenizer; `bos` and `eos` say whether it puts these around a text by itself."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    names = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator(SENTENCES * 3, trainer)
    if bos or eos:
        form = f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}"
        raw.post_processor = processors.TemplateProcessing(single=form, special_tokens=[("<s>", 0), ("</s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": names[2:], **special}
    if "pad_token" in special and special["pad_token"] is None:
        del special["pad_token"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def plain():
    return make_tokenizer()


@pytest.fixture(scope="module")
def with_bos():
    return make_tokenizer(bos=True)


def one(example, tokenizer, **options):
    options = {"role": "forget", "max_length": None, **options}
    (tokens,) = encode([example], tokenizer, **options)
    return tokens


def read(source):
    return read_examples(source, role="forget")


def sentence_of(error):
    """The message, having checked that it is one sentence."""
    message = str(error.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


# ---------------------------------------------------------------- anything a user has -> Examples


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("We hold these truths", [Example("", "We hold these truths")]),
        ("two lines\nof a.txt", [Example("", "two lines\nof a.txt")]),
        (["a", "b.txt"], [Example("", "a"), Example("", "b.txt")]),
        ([{"text": "a"}, "b"], [Example("", "a"), Example("", "b")]),
        ({"text": "a"}, [Example("", "a")]),
        (({"prompt": "Who?", "completion": "He."},), [Example("Who? ", "He.")]),
        ([{"prompt": "Who? ", "completion": "He."}], [Example("Who? ", "He.")]),
        ([{"prompt": "The sky is", "completion": " blue"}], [Example("The sky is", " blue")]),
        ([{"prompt": "天空是", "completion": "蓝色"}], [Example("天空是", "蓝色")]),
        ([{"prompt": "", "completion": "a"}], [Example("", "a")]),
        ([{"prompt": "p", "completion": "c", "text": "ignored", "id": 7}], [Example("p ", "c")]),
        ([{"text": "a", "prompt": None, "completion": None}], [Example("", "a")]),
        ([Example("def f(", "x):")], [Example("def f(", "x):")]),
        (Example("un", "learn"), [Example("un", "learn")]),
    ],
)
def test_texts_and_pairs_become_examples(source, expected):
    """Strings, dicts and Examples are read alike; a space joins a pair only where words would collide."""
    assert read(source) == expected


def test_questions_and_chats_keep_their_turns_beside_a_plain_rendering():
    """A chat template can have the turns, and a tokenizer without one has text."""
    (question,) = read([{"question": "Who?", "answer": "He."}])
    assert question == Example("Who?\n", "He.", (Message("user", "Who?"), Message("assistant", "He.")))
    chat = Example("system: Be brief.\nuser: Who wrote it?\nassistant: ", "Thomas Jefferson.", tuple(
        Message(**turn) for turn in CHAT
    ))  # fmt: skip
    assert read([{"messages": CHAT}]) == [chat]
    assert read([{"prompt": CHAT[:2], "completion": CHAT[2:]}]) == [chat]
    parts = [{"role": "user", "content": [{"type": "text", "text": "Who "}, {"type": "text", "text": "wrote it?"}]}]
    assert read([{"messages": [CHAT[0], *parts, CHAT[2]]}]) == [chat]
    assert read([{"messages": [{"role": "system", "content": ""}, *CHAT[1:]]}])[0].messages[0] == Message("system", "")


def test_a_dataset_is_read_row_by_row_without_being_imported():
    """A datasets.Dataset, and a column of one, are read by their shape alone."""
    dataset = datasets.Dataset.from_dict({"prompt": ["p", "q"], "completion": [" c", " d"], "id": [1, 2]})
    assert read(dataset) == [Example("p", " c"), Example("q", " d")]
    assert read(dataset["prompt"]) == [Example("", "p"), Example("", "q")]
    chats = datasets.Dataset.from_list([{"messages": CHAT}])
    assert read(chats) == read([{"messages": CHAT}])
    with pytest.raises(DataError, match=r'several splits, "train": pass one of them') as error:
        read(datasets.DatasetDict(train=dataset))
    sentence_of(error)


ROWS = [{"prompt": 'He said "a, b"\tto\u2028us', "completion": "x\ny" * 50_000}, {"prompt": "p", "completion": "é"}]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".data.json", ".lines.json", ".csv", ".tsv", ".parquet", ".CSV"])
@pytest.mark.parametrize("as_string", [True, False])
def test_every_file_format_gives_the_same_rows(tmp_path, suffix, as_string):
    """What was written is what is read, with quotes, separators, line ends, U+2028 and a very long field in it."""
    path = tmp_path / f"facts{suffix}"
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif suffix in (".csv", ".tsv", ".CSV"):
        with path.open("w", encoding="utf-8-sig", newline="") as file:  # with the mark that spreadsheets put
            writer = csv.DictWriter(file, ROWS[0], delimiter="\t" if suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        content = {".json": json.dumps(ROWS), ".data.json": json.dumps({"data": ROWS})}.get(suffix, lines)
        path.write_text(content, encoding="utf-8")
    limit = csv.field_size_limit()
    assert read(str(path) if as_string else path) == read(ROWS)
    assert csv.field_size_limit() == limit


def test_a_text_file_is_paragraphs_or_else_lines(tmp_path):
    """A book is parted at its blank lines, a list of sentences at its line ends."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"\nfirst line\r\nsecond line\r\n \r\nnext\r\n\r\n")
    assert read(path) == [Example("", "first line\nsecond line"), Example("", "next")]
    path.write_text("first\nsecond\n\n")
    assert read(path) == [Example("", "first"), Example("", "second")]


def test_a_table_may_end_its_lines_in_any_way(tmp_path):
    """As Linux, Windows and old spreadsheets do."""
    for end in ("\n", "\r\n", "\r"):
        (tmp_path / "a.csv").write_bytes(end.join(["text,id", "a,1", "", "b,2"]).encode())
        assert read(tmp_path / "a.csv") == [Example("", "a"), Example("", "b")]


def test_strings_that_are_not_paths_stay_texts(tmp_path, monkeypatch):
    """A long line, a NUL and a text that no file is named after are texts; the name of an existing file is a path."""
    monkeypatch.chdir(tmp_path)
    for text in ("word " * 5000, "a\0b", "notes", "see notes.md"):
        assert read(text) == [Example("", text)]
    (tmp_path / "notes").write_text("x")
    with pytest.raises(DataError, match="should end in one of"):
        read("notes")
    assert read(["notes"]) == [Example("", "notes")]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", 'the forget text has an empty "text"'),
        ([], "forget holds no example"),
        (["a", " \n"], 'forget example 2 has an empty "text"'),
        (None, "forget must be a text, a path, a list .* and is of type NoneType"),
        (7, "is of type int"),
        (b"bytes", "is of type bytes"),
        (["a", 7], "forget example 2 must be a string or an object .* is of type int"),
        ([{"text": 7}], 'forget example 1 must have a string as "text", and has a value of type int'),
        ([{"text": None}], 'no usable column: .* found "text" \\(empty\\)'),
        ([{"sentence": "a", "id": 1}], 'wanted "text", .* or "messages", found "sentence", "id"'),
        ([{}], "found none"),
        ([{"prompt": "p", "completion": "c"}, {"prompt": "p"}], 'forget example 2 has a "prompt" without "completion"'),
        ([{"prompt": "p", "completion": ""}], 'has a "prompt" without "completion"'),
        ([{"question": "q", "answer": None}], 'has a "question" without "answer"'),
        ([{"prompt": 7, "completion": "c"}], 'must have a string as "prompt"'),
        ([{"prompt": "p", "completion": ["a"]}], 'must have a string as "completion", and has a value of type list'),
        ([{"text": "\ud83d"}], "not valid Unicode: character 1"),
        ([Example("p", "")], 'forget example 1 has an empty "completion"'),
        ([{"messages": "hello"}], 'must have a list of objects as "messages"'),
        ([{"messages": []}], "and has: none"),
        ([{"messages": CHAT[:2]}], "must have messages that end with one by the assistant .* has: system, user"),
        ([{"messages": CHAT[2:]}], "after another's, and has: assistant"),
        ([{"messages": [*CHAT[:1], {"role": "assistant"}]}], 'message 2 of forget example 1 .* "content", and is role'),
        ([{"messages": [*CHAT[:1], {"role": "assistant", "content": None}]}], 'must have a string as "content"'),
    ],
)
def test_an_unusable_source_is_refused_in_one_sentence(source, message):
    """The sentence says whose text it is, which example, what was wanted and what came."""
    with pytest.raises(DataError, match=message) as error:
        read(source)
    sentence_of(error)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "the forget file .*a.jsonl is empty"),
        ("a.txt", " \n\n", "is empty"),
        ("a.json", "[]", "holds no example"),
        ("a.csv", "text\n", "holds no example"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": }\n', "line 3, is not JSON: Expecting value at column 10"),
        ("a.jsonl", '{"text": "a"}\n{"id": 1}\n', 'line 2, has no usable column: .* found "id"'),
        ("a.jsonl", '{"prompt": "a"}\n', 'line 1, has a "prompt" without "completion"'),
        ("a.json", '[{"text": "a"},\n]', "is not JSON: .* at line [12], column"),
        ("a.json", "7", "must hold a list of objects or strings, .* and holds a value of type int"),
        ("a.csv", "sentence\na\n", 'row 1, has no usable column: .* found "sentence"'),
        ("a.csv", "text\na\nHello, world\n", "row 2, has 2 fields under 1 columns: quote texts"),
        ("a.csv", "prompt,completion\na,b\nc\n", 'row 2, has a "prompt" without "completion"'),
        ("a.csv", 'text\na\n"b\n', "row 2, is malformed: unexpected end of data"),
        ("a.txt", b"caf\xe9", "is not UTF-8 text, as byte 4 shows"),
        ("a.parquet", b"PAR0", "cannot be read as parquet"),
        ("a.docx", "x", "should end in one of .jsonl, .json"),
    ],
)
def test_an_unusable_file_is_refused_in_one_sentence(tmp_path, name, content, message):
    """The sentence names the file and the line or row."""
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as error:
        read(path)
    sentence_of(error)


@pytest.mark.parametrize("source", ["no/such.jsonl", "gone.txt", Path("gone")])
def test_a_missing_file_is_never_taken_for_a_text(source):
    """Whatever ends like a file we read, and any Path, has to exist."""
    with pytest.raises(DataError, match="was not found: check the path") as error:
        read_examples(source, role="holdout")
    assert sentence_of(error).startswith("the holdout file ")


def test_a_folder_and_an_unreadable_file_are_refused(tmp_path):
    """Neither ends in a traceback of the operating system."""
    with pytest.raises(DataError, match="is a folder"):
        read(tmp_path)
    if os.name == "posix" and os.geteuid():
        path = tmp_path / "a.txt"
        path.write_text("x")
        path.chmod(0)
        with pytest.raises(DataError, match="cannot be read: Permission denied"):
            read(path)


def test_parquet_without_pyarrow_says_how_to_install_it(tmp_path, monkeypatch):
    """pyarrow is optional, and only parquet needs it."""
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DependencyError, match="pip install pyarrow") as error:
        read(tmp_path / "a.parquet")
    sentence_of(error)


# ---------------------------------------------------------------- Examples -> Tokens


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
    (example,) = read([{"messages": CHAT}])
    tokens = one(example, tokenizer)
    assert tokenizer.decode(tokens.scored) == "Thomas Jefferson.<|im_end|>"
    assert tokenizer.decode(tokens.ids).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")
    assert tokenizer.decode(tokens.ids[: tokens.first]).endswith("<|im_start|>assistant\n")
    (question,) = read([{"question": "Who wrote it?", "answer": "Thomas Jefferson."}])
    assert one(question, tokenizer).scored == tokens.scored


def test_without_a_chat_template_a_chat_is_lines(plain):
    """role: content, and only the answer is scored, with the end of text."""
    tokens = one(read([{"messages": CHAT}])[0], plain)
    assert plain.decode(tokens.ids) == "system: Be brief.\nuser: Who wrote it?\nassistant: Thomas Jefferson.</s>"
    assert plain.decode(tokens.scored) == " Thomas Jefferson.</s>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages | length }}: {{ messages[-1]['content'] }}", "cannot be parted into prompt and answer"),
        ("{{ raise_exception('roles must alternate') }}", "is refused by the tokenizer's chat template: roles must"),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_refused(template, message):
    """Scored tokens that cannot be told from the prompt's are an error, and so is a template that raises."""
    with pytest.raises(DataError, match=message) as error:
        one(read([{"messages": CHAT}])[0], make_tokenizer(template=template))
    assert "give it as prompt and completion" in sentence_of(error)


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
    with pytest.raises(DataError, match=f"holdout example 2 .* has {length} tokens where the limit is 9") as error:
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
    with pytest.raises(DataError, match='forget example 1 \\("a"\\) has no token to score: it is one token') as error:
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


def test_a_long_text_is_quoted_by_its_beginning_only(plain):
    """An error names an example by its first words."""
    with pytest.raises(DataError, match=r'example 1 \("We hold these truths to be self-evide\.\.\."\) has'):
        one(Example("", SENTENCES[0]), plain, max_length=2)


def test_no_examples_are_no_tokens(plain):
    """A missing retain set is not an error here."""
    assert encode([], plain, role="retain", max_length=8) == []


def test_padding_id_is_pad_or_end_of_text_or_zero(plain):
    """A tokenizer without a pad token is no obstacle."""
    assert padding_id(make_tokenizer(pad_token="<|im_end|>")) == 3
    assert padding_id(plain) == 1
    assert padding_id(make_tokenizer(eos_token=None)) == 0


# ---------------------------------------------------------------- Tokens -> TokenBatch

PAD = START = 1  # also an ordinary token below: the end of text is often all three
ids = st.lists(st.integers(0, 3), min_size=2, max_size=9).map(tuple)
causal = ids.flatmap(lambda i: st.builds(Tokens, st.just(i), st.integers(1, len(i) - 1)))
paired = st.tuples(ids, ids).flatmap(lambda p: st.builds(Tokens, st.just(p[0]), st.integers(0, 1), st.just(p[1])))


@settings(deadline=None, max_examples=50)
@given(st.lists(causal, min_size=1, max_size=5))
def test_a_causal_batch_holds_the_targets_and_never_padding(tokens):
    """Row r of example b predicts what stands right after it; eos = pad changes nothing."""
    batch = collate(tokens, pad_id=PAD)
    check(tokens, batch)
    width = batch.ids.shape[1]
    flat_ids, flat_mask = batch.ids.flatten(), batch.attention_mask.flatten()
    assert torch.equal(batch.rows // width, batch.example)
    assert torch.equal(flat_ids[batch.rows + 1], batch.targets)
    assert flat_mask[batch.rows].all()
    assert flat_mask[batch.rows + 1].all()
    assert batch.decoder_ids is None


@settings(deadline=None, max_examples=50)
@given(st.lists(paired, min_size=1, max_size=5))
def test_an_encoder_decoder_batch_shifts_the_decoder_right(tokens):
    """Position j of the decoder reads token j - 1 and predicts token j."""
    batch = collate(tokens, pad_id=PAD, decoder_start_id=START)
    check(tokens, batch)
    width = batch.decoder_ids.shape[1]
    assert width == max(len(t.decoder) for t in tokens)
    assert torch.equal(batch.rows // width, batch.example)
    for b, t in enumerate(tokens):
        assert batch.decoder_ids[b].tolist()[: len(t.decoder)] == [START, *t.decoder[:-1]]
        positions = (batch.rows[batch.example == b] % width).tolist()
        assert positions == list(range(t.first, len(t.decoder)))


def check(tokens, batch):
    """What holds for both kinds: un-flattened, the batch is the tokens again."""
    assert batch.ids.shape == batch.attention_mask.shape == (len(tokens), max(len(t.ids) for t in tokens))
    assert {t.dtype for t in vars(batch).values() if t is not None} == {torch.int64}
    assert batch.counts.tolist() == [len(t.scored) for t in tokens]
    assert torch.equal(batch.rows, batch.rows.unique(sorted=True))
    for b, t in enumerate(tokens):
        assert tuple(batch.targets[batch.example == b].tolist()) == t.scored
        assert tuple(batch.ids[b, : len(t.ids)].tolist()) == t.ids
        assert batch.attention_mask[b].tolist() == [1] * len(t.ids) + [0] * (batch.ids.shape[1] - len(t.ids))
        assert (batch.ids[b, len(t.ids) :] == PAD).all()


@settings(deadline=None, max_examples=50)
@given(st.lists(causal, max_size=12), st.integers(1, 5))
def test_batches_hold_every_example_once_and_the_longest_first(tokens, batch_size):
    """The indices put results back in order, and the batches are the same in every run."""
    out = list(batches(tokens, batch_size, pad_id=PAD))
    order = [i for indices, _ in out for i in indices]
    assert sorted(order) == list(range(len(tokens)))
    assert [len(tokens[i]) for i in order] == sorted(map(len, tokens), reverse=True)
    assert all(len(indices) == batch_size for indices, _ in out[:-1])
    for indices, batch in out:
        check([tokens[i] for i in indices], batch)
    assert order == [i for indices, _ in batches(tokens, batch_size, pad_id=PAD) for i in indices]


def test_a_batch_moves_as_a_whole():
    """Every tensor of it, and what is absent stays absent."""
    batch = collate([Tokens((1, 2), 1)], pad_id=0)
    moved = batch.to("meta")
    assert isinstance(moved, TokenBatch)
    assert {t.device.type for t in vars(moved).values() if t is not None} == {"meta"}
    assert moved.decoder_ids is None
    assert torch.equal(batch.to("cpu").ids, batch.ids)


def test_a_batch_that_makes_no_sense_is_refused():
    """Nothing in it, two kinds in it, or the wrong start."""
    one_kind, other = Tokens((1, 2), 1), Tokens((1,), 0, (2,))
    for tokens, start in ([one_kind, other], 0), ([one_kind], 0), ([other], None):
        with pytest.raises(ArgumentError, match="decoder_start_id must be given with"):
            collate(tokens, pad_id=0, decoder_start_id=start)
    with pytest.raises(ArgumentError, match="at least one example"):
        collate([], pad_id=0)
    with pytest.raises(ArgumentError, match="batch_size must be at least 1, and is 0"):
        batches([one_kind], 0, pad_id=0)


# ---------------------------------------------------------------- errors


def test_every_error_is_in_the_tree_and_a_builtin_too():
    """`except PyunlearnError` catches them all, and the docstring draws them all."""
    for name in errors.__all__:
        kind = getattr(errors, name)
        if isinstance(kind, type) and kind is not PyunlearnError:
            builtin = kind.__mro__[2]
            assert issubclass(kind, PyunlearnError)
            assert f"{name} " in errors.__doc__
            assert f"({builtin.__name__})" in errors.__doc__
            assert str(kind("a sentence.")) == "a sentence."


def test_nearest_suggests_or_else_lists():
    """A typo gets the nearest name, anything else gets them all."""
    assert nearest("NPOO", ["ga", "npo", "simnpo"]) == 'did you mean "npo"?'
    assert nearest("xyzzy", ["npo", "ga"]) == "choose from ga, npo."
