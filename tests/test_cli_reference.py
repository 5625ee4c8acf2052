"""The reference page: its tables of options are those of the configs."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_options_in_the_reference_are_those_of_the_configs():
    """After a change run `python scripts/reference.py`."""
    spec = importlib.util.spec_from_file_location("reference", ROOT / "scripts" / "reference.py")
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert page == reference.updated(page)
    assert page.count("`--max-steps`") == 1
    assert "| `target_exposure` | `--target-exposure` | `1.4427` | a number, 0 or more and below 4.32 |" in page
