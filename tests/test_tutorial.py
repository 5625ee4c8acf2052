"""The tutorial, followed word for word: its commands, what they print, its Python lines."""

import importlib.util
import re
import runpy
import shlex

import pytest
from test_documents import ROOT, blocks

TUTORIAL = ROOT / "docs" / "tutorial.md"
CODES = [1, 0, 1, 0]  # memorized, forgotten, comes back when it is trained on the others, like unseen text


def shape(text):
    """Return the lines of an output, without numbers, marks of doubt, and the breaks and lengths of lines."""
    text = re.sub(r"[-+]?\d[\d.,e+-]*", "#", text.replace(" ?", "  "))
    return {" ".join(line.split()) for line in re.split(r"\n|(?<=[.;:]) ", text) if line.strip()}


@pytest.mark.full
@pytest.mark.timeout(600)
def test_the_tutorial_ends_where_it_says(call, tmp_path, monkeypatch, capsys):
    """Each command ends with the exit code of the text, and prints nine in ten of the lines that are shown."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    first, *commands = [shlex.split(block.replace("\\\n", "")) for block in blocks(TUTORIAL, ("sh",))]
    shown = blocks(TUTORIAL, ("text",))
    monkeypatch.setattr("sys.argv", first[1:])
    runpy.run_path(str(ROOT / first[1]), run_name="__main__")
    for words, text, code in zip(commands, shown, CODES, strict=True):
        assert words[0] == "pyunlearn"
        ended, out, err = call(*words[1:])
        assert ended == code, err
        lines = shape(text)
        assert len(lines & shape(out)) >= 0.9 * len(lines), lines - shape(out)
    if importlib.util.find_spec("jinja2"):
        assert (tmp_path / "shop" / "after" / "audit.html").exists()
    (block,) = blocks(TUTORIAL, ("python",))
    capsys.readouterr()
    exec(compile(block, "docs/tutorial.md", "exec"), {})
    assert capsys.readouterr().out.startswith("True ['forgotten'")
