"""TOFU's task definitions for lm-evaluation-harness give the numbers of `pyunlearn bench tofu` on the same weights."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from task_files import own_copies
from tofu_folder import bench, tofu_folder, tofu_rows

from pyunlearn.models.harness import HarnessTasks
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.progress import Progress

pytest.importorskip("lm_eval")
TASKS = Path(__file__).parent.parent / "benchmarks" / "lm_eval" / "tofu"
NAMES = {"forget": "forget10", "retain": "retain", "real authors": "real_authors", "world facts": "world_facts"}


def long_llama(vocabulary):
    """Return a Llama with room for the 200 tokens that TOFU's answers may have."""
    return tiny.tiny_llama(vocabulary, max_position_embeddings=320)


@pytest.fixture(scope="module")
def known(one_thread):
    """A model that answers in TOFU's form: the retain set often right, the two forget records by heart."""
    answers = tiny.trained(long_llama, tiny.facts, count=40, repeats=1, epochs=1, form="<s> $A")
    model, rows = answers.fresh(), [*answers.forget * 4, *answers.retain]
    form = [{"prompt": f"Question: {row['question']}\nAnswer: ", "completion": row["answer"]} for row in rows]
    tiny.train(model, answers.tokenizer, form, epochs=60)
    return replace(answers, model=model)


@pytest.fixture
def data(known, tmp_path, monkeypatch):
    """A small folder like TOFU's, which the tasks read in place of the hub."""
    own_copies(monkeypatch, tmp_path)
    folder = tofu_folder(tmp_path / "TOFU", tofu_rows(known))
    monkeypatch.setenv("TOFU_FOLDER", str(folder))
    return folder


@pytest.mark.full
def test_the_tasks_agree_with_bench(known, data):
    """Probability and truth ratio of each question to 1e-4, ROUGE-L recall exactly; so all columns do."""
    result = bench(known, data, template="plain")
    lm = LanguageModel.of(known.model, known.tokenizer)
    tasks = HarnessTasks([str(TASKS / "tofu.yaml")], None, known.model, known.tokenizer, Progress(False))
    run = tasks.run(lm, batch_size=4, bar=Progress(False), who="the model")
    made = {(x.task, x.metric): x for x in run.numbers}
    assert len(made) == 12
    assert run.cut == 0
    for name, suffix in NAMES.items():
        prefix = name.replace(" ", "_")
        for metric in ("probability", "truth_ratio"):
            x = made[f"tofu_{suffix}", metric]
            np.testing.assert_allclose(x.value, result[f"{prefix}_{metric}"].estimate, rtol=1e-4, atol=1e-5)
        rouge = made[f"tofu_{suffix}_rouge", "rouge"]
        assert rouge.items == result.numbers[name]["rouge"].tolist()
        np.testing.assert_allclose(rouge.value, result[f"{prefix}_rouge"].estimate, rtol=1e-12)
    answers = np.log(made["tofu_forget10", "probability"].items)
    np.testing.assert_allclose(answers, result.numbers["forget"]["answer"], atol=1e-4)
    assert 0.05 < result["retain_rouge"].estimate < 1  # so that the test compares something
