"""Code of docs/edits.md and docs/in-context.md: each Python block runs with a tiny model and data."""

import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import pyunlearn

pytestmark = pytest.mark.usefixtures("one_thread")

DOCS = Path(__file__).parent.parent / "docs"


def blocks(name):
    """Return the Python blocks of a document."""
    return re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("at", range(4))
def test_the_code_of_the_document_on_edits_runs(story, at):
    """The block finds model, forget, retain and tokenizer; a run takes one step here."""
    package = SimpleNamespace(unlearn=partial(pyunlearn.unlearn, max_steps=1, progress=False))
    names = {"pyunlearn": package, "model": story.fresh(), "tokenizer": story.tokenizer}
    names |= {"forget": story.forget, "retain": story.retain[:20]}
    every = blocks("edits.md")
    assert len(every) == 4
    exec(compile(every[at], f"docs/edits.md, block {at + 1}", "exec"), names)
    if "undo()" in every[at]:
        assert names["result"].nll_after["forget"] > names["result"].nll_before["forget"]
    else:
        assert names["result"].examples


def test_the_code_of_the_document_on_examples_in_the_prompt_runs():
    """The block finds embeddings and examples; the prompt does not contain the deleted example."""
    generator = np.random.default_rng(0)
    examples = [f"<{i}>" for i in range(60)]
    names = {"embeddings": generator.random((60, 2)), "examples": examples}
    (block,) = blocks("in-context.md")
    exec(compile(block, "docs/in-context.md", "exec"), names)
    assert "<41>" not in names["prompt"]
    assert names["prompt"].count("<") == 8
