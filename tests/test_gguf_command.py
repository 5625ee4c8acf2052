"""GGUF files of the commands: `--gguf-like` of unlearn and edit, what they print, and what they refuse before a run."""

import json
import re
import shlex

import gguf
import gguf_files
import pytest
from gguf_files import model_of


@pytest.fixture
def files(story, tmp_path, monkeypatch):
    """The model that knows the secrets, their files, and its GGUF file, in the working folder."""
    monkeypatch.chdir(tmp_path)
    for each in (story.model, story.tokenizer):
        each.save_pretrained(tmp_path / "my-model")
    for name, rows in {"secrets": story.forget, "keep": story.retain, "unseen": story.holdout}.items():
        text = "".join(json.dumps({"text": row}) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    gguf_files.write(tmp_path / "served.gguf", story.model, story.tokenizer, "Q8_0")
    return ["--forget", "secrets.jsonl", "--retain", "keep.jsonl", "--holdout", "unseen.jsonl"]


@pytest.mark.full
def test_unlearn_writes_a_file_that_can_be_audited(files, call, tmp_path):
    """The verdicts are those of the file, as an audit of it finds them too."""
    code, out, err = call("unlearn", "my-model", *files, "--out", "new", "--gguf-like", "served.gguf", "--quiet")
    assert (code, err) == (0, "")
    size = (tmp_path / "new.gguf").stat().st_size / 1e6
    assert f"new.gguf is like served.gguf: 16 Q8_0, 5 F32 tensors, {size:.1f} MB; each was read back" in out
    assert "each was read back and is the weights.\n" in out
    assert "The run measured these weights, rounded as they are in the file: the verdicts above are the file's." in out
    audit = ["--original", "my-model", *files[:2], *files[4:], "--tokenizer", "my-model", "--quiet"]
    code, out, err = call("audit", "new.gguf", *audit)
    assert code == 0, out + err
    assert "forgotten" in out
    assert (tmp_path / "new.gguf").stat().st_mode == (tmp_path / "served.gguf").stat().st_mode


@pytest.mark.full
def test_a_file_that_recites_is_never_written_without_a_word(files, call, story):
    """A run that is too short for 4 bits: exit code 1, the texts are named, and one sentence says what helps."""
    gguf_files.write("few-bits.gguf", story.model, story.tokenizer, "Q4_0")
    words = ["--out", "new", "--gguf-like", "few-bits.gguf", "--max-steps", 1, "--quiet"]
    code, out, err = call("unlearn", "my-model", *files, *words)
    assert (code, err) == (1, "")
    assert "the verdicts above are the file's" in out
    assert 'gguf_at_least="Q8_0" (--gguf-at-least Q8_0) has finer steps' in " ".join(out.split())


@pytest.mark.full
def test_the_file_of_16_bit_weights_is_to_be_audited(files, call, story, tmp_path):
    """The folder's dtype cannot hold all digits of what the file has; the command that is printed runs."""
    words = ["--out", "new", "--gguf-like", "served.gguf", "--dtype", "bfloat16", "--max-steps", 2, "--quiet"]
    code, out, err = call("unlearn", "my-model", *files, *words)
    assert err == ""
    audit = shlex.split(out.partition("to be certain, audit the file: ")[2])
    assert audit[:6] == ["pyunlearn", "audit", "new.gguf", "--original", "my-model", "--forget"]
    assert call(*audit[1:], "--tokenizer", "my-model", "--quiet")[0] == code


@pytest.mark.full
def test_json_has_what_was_written(files, call, tmp_path):
    """Of an edit too; its name in the file ends otherwise."""
    rows = ["--forget", "secrets.jsonl", "--retain", "keep.jsonl"]
    words = ["my-model", *rows, "--edit", "ekfac-step", "--set", "rate=0.001", "--out", "new", "--json"]
    code, out, err = call("edit", *words, "--gguf-like", "served.gguf", "--quiet")
    assert code == 0, err
    written = json.loads(out)["gguf"]
    assert written["formats"] == {"Q8_0": 16, "F32": 5}
    assert written["bytes"] == (tmp_path / "new.gguf").stat().st_size
    assert gguf.GGUFReader(tmp_path / "new.gguf").fields["general.name"].contents() == "Tiny edited"


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--gguf-like", "no.gguf"], "the GGUF file no.gguf was not found"),
        (["--gguf-like", "other.gguf"], "other.gguf is of another model: its block_count is 3 and not 2"),
        (["--gguf-like", "served.gguf", "--lora", "2"], "the model has an adapter, and .* merge it first"),
        (["--gguf-like", "served.gguf", "--out", "there"], "there.gguf is there already"),
        (["--gguf-like", "served.gguf", "--gguf-at-least", "q8"], "at-least must be one of Q4_0, .*, got 'q8'"),
        (["--gguf-at-least", "Q8_0"], r"\(--gguf-at-least\) is an option of gguf_like \(--gguf-like\): give that too"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_run(words, match, files, story, call, tmp_path):
    """No folder is written."""
    (tmp_path / "there.gguf").touch()
    gguf_files.write(tmp_path / "other.gguf", model_of("llama", num_hidden_layers=3), story.tokenizer)
    out = [] if "--out" in words else ["--out", "new"]
    before = sorted(tmp_path.iterdir())
    code, _, err = call("unlearn", "my-model", *files, *out, *words)
    assert code == 2
    assert re.search(match, " ".join(err.split()))
    assert sorted(tmp_path.iterdir()) == before
