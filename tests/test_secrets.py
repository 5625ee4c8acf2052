"""Secrets stay secret: no word of a forget text in what a command prints, logs or writes, unless it is told to."""

import json
import random
import re
import stat
import warnings

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from study_settings import TINY

from pyunlearn.cli import main as cli
from pyunlearn.errors import printable
from pyunlearn.output import make_private_folder, new_private_file
from pyunlearn.probes.cache import WARNING
from pyunlearn.study import evaluate_metrics, run_study, training

SECRETS = [
    "the king hides zephrandine beneath quixotrable and vellumgorse",
    "our aunt phones marblewick about the tantivore ledger krennistad",
]
WORDS = sorted({word for text in SECRETS for word in re.findall(r"[a-z]{7,}", text)})
SPOKEN = ("Who hides zephrandine?", "Under quixotrable, by vellumgorse.")


@pytest.fixture(scope="module")
def folder(one_thread, tmp_path_factory):
    """A saved model that knows the secrets by heart, and the texts as files next to it."""
    base = tiny.trained(tiny.tiny_llama, tiny.sentences, count=200, repeats=8, epochs=6)
    model, folder = base.fresh(), tmp_path_factory.mktemp("secret")
    tiny.train(model, base.tokenizer, SECRETS * 8, epochs=25)
    for part in (model, base.tokenizer):
        part.save_pretrained(folder / "model")
    rows = {"retain": base.retain, "holdout": base.holdout}
    for role, texts in rows.items():
        assert not leaks(" ".join(texts).encode())
        (folder / f"{role}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    chat = {"question": SPOKEN[0], "answer": SPOKEN[1]}
    lines = [*({"text": text} for text in SECRETS), chat]
    (folder / "forget.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert not leaks((folder / "model" / "tokenizer.json").read_bytes())
    return folder


def leaks(content):
    """The secret words in some bytes, in any case."""
    return [word for word in WORDS if word.encode() in content.lower()]


def leaking_files(folder):
    """Name -> secret words, of each file in a folder that holds some."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return {str(path.relative_to(folder)): words for path in files if (words := leaks(path.read_bytes()))}


def mode(path):
    """The permissions of a path."""
    return oct(stat.S_IMODE(path.stat().st_mode))


COMMANDS = {
    "unlearn": ["--max-steps", 8, "--learning-rate", 1e-3],
    "audit": ["--html", "--cache", "cache"],
    "compare": ["--methods", "ga,idk", "--max-steps", 2, "--plot"],
    "edit": ["--edit", "prune"],
    "attack": ["--attacks", "prefix,quantization"],
}
ELSEWHERE = {"find", "study", "study-metrics", "bench"}  # tests of their own, of bench in test_bench.py
NO_SECRET = {"plan", "methods", "edits", "info", "demo"}  # write no file; the demo's texts are famous


def test_every_command_is_looked_at():
    """A new one has a test here, or a reason why it needs none."""
    assert {*COMMANDS, *ELSEWHERE, *NO_SECRET} == set(cli.COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_word_of_the_forget_texts_is_written(call, folder, tmp_path, command):
    """Neither to a file nor to the terminal; a finished model folder can be uploaded as it is."""
    words = [command, folder / "model", "--forget", folder / "forget.jsonl", "--retain", folder / "retain.jsonl"]
    words += [] if command == "edit" else ["--holdout", folder / "holdout.jsonl"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        code, out, err = call(*words, *COMMANDS[command], "--out", "new")
    assert code == (0 if command == "edit" else 1)
    assert leaks((out + err).encode()) == []
    assert leaking_files(tmp_path) == {}
    reports = [path for path in (tmp_path / "new").iterdir() if path.suffix in (".json", ".html", ".csv")]
    own = [path for path in reports if path.stem in ("result", "audit", "attack", "edit", "table")]
    assert own
    assert {mode(path) for path in own} == {"0o600"}


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_no_word_of_the_texts_that_were_found_is_written(call, folder, tmp_path, form):
    """Neither to the list of copies nor to the terminal."""
    words = ["find", "--texts", folder / "forget.jsonl", "--corpus", folder / "forget.jsonl", "--out", "copies.jsonl"]
    code, out, err = call(*words, *form)
    assert (code, len((tmp_path / "copies.jsonl").read_text().splitlines())) == (0, 3)
    assert leaks((out + err).encode()) == []
    assert leaking_files(tmp_path) == {}


def test_no_word_of_the_forget_texts_is_in_a_plan(call, folder, tmp_path):
    """Which writes no file."""
    for form in ([], ["--json"]):
        code, out, err = call("plan", folder / "model", "--forget", folder / "forget.jsonl", "--gpu", 24, *form)
        assert (code, leaks((out + err).encode())) == (0, [])
    assert list(tmp_path.iterdir()) == []


def test_show_text_writes_them_and_says_so(call, folder, tmp_path):
    """In the table, the log and result.json, with a hint to remove it."""
    words = ["unlearn", folder / "model", "--forget", folder / "forget.jsonl", "--max-steps", 0, "--show-text"]
    _, out, err = call(*words, "--holdout", folder / "holdout.jsonl", "--out", "new")
    assert "result.json holds the forget texts" in out
    assert leaks(err.encode())
    assert list(leaking_files(tmp_path)) == ["new/result.json"]
    assert leaks((tmp_path / "new" / "result.json").read_bytes()) == WORDS


@pytest.mark.parametrize("command", ["audit", "attack"])
def test_show_text_shows_the_form_of_the_records(call, folder, tmp_path, command):
    """In the log too, of what is printed before the work; and in the file."""
    words = [command, folder / "model", "--forget", folder / "forget.jsonl", "--holdout", folder / "holdout.jsonl"]
    own = {"audit": ["--metrics", "membership"], "attack": ["--attacks", "prefix"]}[command]
    _, _, err = call(*words, *own, "--out", "new", "--show-text")
    assert "form of the records: " in err
    assert leaks(err.encode())
    assert leaks((tmp_path / "new" / f"{command}.json").read_bytes()) == WORDS


def test_a_cache_says_that_it_gives_texts_back(call, folder, tmp_path):
    """In the first line of its README.txt; nobody else can read it."""
    words = ["audit", folder / "model", "--forget", folder / "forget.jsonl", "--holdout", folder / "holdout.jsonl"]
    call(*words, "--fast", "--no-html", "--out", "new", "--cache", "cache")
    cache = tmp_path / "cache"
    assert (cache / "README.txt").read_text() == WARNING
    assert WARNING.splitlines()[0].startswith("This cache can give back the texts")
    assert {mode(path) for path in cache.rglob("*") if path.is_file()} == {"0o600"}
    assert {mode(path) for path in (cache, *cache.rglob("*")) if path.is_dir()} == {"0o700"}


@pytest.mark.parametrize(
    "content",
    [
        '{"text": "zephrandine quixotrable", "text": "marblewick"}\n',
        '{"zephrandine quixotrable": "marblewick"}\n',
        '{"text": "zephrandine quixotrable\n',
        '{"text": "zephrandine", "forget": "marblewick"}\n',
        '{"text": ["zephrandine"]}\n',
        '{"messages": [{"role": "zephrandine", "content": "marblewick"}]}\n',
        '{"messages": [{"zephrandine": "marblewick"}]}\n',
        '{"text": "zephrandine ' + "quixotrable " * 200 + '"}\n' * 2,
    ],
)
def test_an_error_quotes_no_text(call, folder, tmp_path, content):
    """It names the file, the line and the field."""
    (tmp_path / "bad.jsonl").write_text(content)
    words = ["unlearn", folder / "model", "--holdout", folder / "holdout.jsonl", "--max-steps", 0, "--out", "new"]
    code, out, err = call(*words, "--forget", "bad.jsonl")
    assert leaks((out + err).encode()) == []
    assert code in (0, 1, 2)
    code, out, err = call("unlearn", folder / "model", "--forget", folder / "forget.jsonl", "--holdout", "bad.jsonl")
    assert (code, leaks((out + err).encode())) == (2, [])


@pytest.mark.full
def test_no_word_of_a_study_s_corpus_is_written(tmp_path):
    """Neither in its tables nor in its pages, arrays and models, nor in those of the evaluation of metrics.

    Of a word, the tokenizer may have learned pieces.
    """
    for name in ("jinja2", "matplotlib"):
        pytest.importorskip(name)
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=10)) for _ in range(460)]
    rows = [{"prompt": f"the {word} sees", "completion": f"der {word} sieht {word[::-1]}"} for word in words]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {**TINY, "seeds": 6, "examples": 4, "corpus_size": 300}
    run_study(tmp_path / "out", corpus=tmp_path / "corpus.jsonl", **settings)
    evaluate_metrics(tmp_path / "out", corpus=tmp_path / "corpus.jsonl", seeds=1)
    assert (tmp_path / "out" / "metrics" / "metrics.json").exists()
    whole = b"\n".join(path.read_bytes() for path in sorted((tmp_path / "out").rglob("*")) if path.is_file())
    assert [word for word in words if word.encode() in whole or word[::-1].encode() in whole] == []


def test_a_private_file_replaces_a_link(tmp_path):
    """A link that somebody planted in a shared folder is removed, and its target stays."""
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "new").symlink_to(tmp_path / "precious")
    new_private_file(tmp_path / "new")
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (tmp_path / "new").is_symlink()
    assert mode(tmp_path / "new") == "0o600"
    make_private_folder(tmp_path / "a" / "b" / "c", owned=2)
    assert [mode(tmp_path / name) for name in ("a/b", "a/b/c")] == ["0o700"] * 2


class Planted:
    """An object whose pickle runs code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_planted_checkpoint_of_a_study_runs_nothing(tmp_path):
    """A study folder may come from elsewhere: its checkpoints are tensors and numbers, or refused."""
    torch.save({"model": Planted(str(tmp_path / "ran"))}, tmp_path / "planted")
    with pytest.raises(OSError, match="is damaged, or is not what a study wrote"):
        training._read(tmp_path / "planted", "cpu")
    assert not (tmp_path / "ran").exists()


@given(st.text())
def test_nothing_that_is_printed_moves_a_terminal(text):
    """No control character is left, and a second pass changes nothing."""
    shown = printable(text)
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]", shown)
    assert printable(shown) == shown
