"""The commands of the how-to pages run, on a tiny model and files under the names that they use."""

import json
import random

import gguf_files
import pytest
from test_documents import blocks, commands, short_runs  # noqa: F401  a fixture
from test_public import ROOT

PAGES = ["holdout.md", "not-memorized.md", "in-ci.md", "chats-and-documents.md", "serve.md"]


@pytest.fixture
def folder(story, tmp_path, monkeypatch):
    """The model that knows the secrets, and their files, in the working folder."""
    for each in (story.model, story.tokenizer):
        each.save_pretrained(tmp_path / "my-model")
    gguf_files.write(tmp_path / "served.gguf", story.model, story.tokenizer, "Q8_0")
    texts = {"secrets": story.forget, "keep": story.retain, "unseen": story.holdout}
    rng, words = random.Random(0), sorted({word for text in story.retain for word in text.split()})
    books = [" ".join(rng.choices(words, k=300)) for _ in range(21)]
    texts |= {"book": books[:1], "other-books": books[1:]}
    rows = {name: [{"text": text} for text in each] for name, each in texts.items()}
    chat = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": story.forget[0]}]
    for name, each in {**rows, "chats": [{"messages": chat}]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.full
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(page, folder, story, call, short_runs):  # noqa: F811
    """In order; two steps leave the texts exposed."""
    done = commands(ROOT / "docs" / page)
    assert done
    for words in done:
        if "./my-model-unlearned" in words and words[1] != "unlearn" and not (folder / "my-model-unlearned").exists():
            call("unlearn", "my-model", "--forget", "secrets.jsonl", "--holdout", "unseen.jsonl", "--out", words[2])
        code, out, err = call(*words[1:])
        assert code in (0, 1), err
        assert out
    for code in blocks(ROOT / "docs" / page, ("python",)):
        exec(code, {})
