"""The notebook: its cells run in order, and end with the customer forgotten; it shows what they print."""

import json
import shutil
import sys

import pytest
from test_public import ROOT

NOTEBOOK = ROOT / "examples" / "forget_a_customer.ipynb"


@pytest.mark.full
@pytest.mark.timeout(600)
def test_the_cells_of_the_notebook_run(tmp_path, monkeypatch, capsys):
    """Each in the names of those before it; the outputs in the file are those of such a run."""
    pytest.importorskip("matplotlib").use("agg")
    shutil.copy(NOTEBOOK.parent / "train_a_small_model.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    names = {}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        exec(compile("".join(cell["source"]), NOTEBOOK.name, "exec"), names)
        printed = capsys.readouterr().out.splitlines()
        shown = [line.strip() for output in cell["outputs"] for line in output.get("text", [])]
        assert [line.split()[0] for line in shown] == [line.split()[0] for line in printed]
        assert str(tmp_path) not in "".join(shown)
    assert names["before"].verdicts == {"still exposed": 12}
    assert names["result"].forgotten
    assert names["after"].passed
    assert "matplotlib" in sys.modules
