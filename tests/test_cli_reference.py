"""The reference page: its tables of options are those of the configs, its names those of the packages."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_reference_is_that_of_the_configs_and_packages():
    """After a change of an option, a signature or a docstring run `python scripts/reference.py`."""
    spec = importlib.util.spec_from_file_location("reference", ROOT / "scripts" / "reference.py")
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert page == reference.updated(page)
    assert page.count("`--max-steps`") == 1
    assert "| `target_exposure` | `--target-exposure` | `1.4427` | a number, 0 or more and below 4.32 |" in page
    assert "- `auc(forget, holdout, *, confidence, members)`: Compute the area under the ROC curve" in page
    assert page.count("\n- `perplexity(") == 1
