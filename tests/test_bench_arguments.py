"""Benchmarks: wrong arguments, files and results of other models, each refused in one sentence."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tofu_folder import bench, tofu_folder, tofu_rows, write

import pyunlearn
from pyunlearn.errors import ArgumentError, DataError, ModelError


@pytest.fixture(scope="module")
def rows(answers):
    """The rows of TOFU's four files."""
    return tofu_rows(answers)


@pytest.fixture
def data(rows, tmp_path):
    """A folder like TOFU's."""
    return tofu_folder(tmp_path / "TOFU", rows)


def test_an_output_folder_that_is_not_empty_is_refused(call, data):
    """Before a model is looked for."""
    Path("out").mkdir()
    (Path("out") / "bench.json").write_text("{}")
    code, out, err = call("bench", "tofu", "no-model", "--data", data, "--out", "out")
    assert (code, out) == (2, "")
    assert "not empty" in err
    assert (Path("out") / "bench.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"benchmark": "tofus"}, r'benchmark must be one of tofu.*, got \'tofus\': did you mean "tofu"\?'),
        ({"benchmark": 3}, "benchmark must be one of tofu.*, got 3"),
        ({"data": "nowhere"}, "the data folder nowhere was not found: give the folder"),
        ({"data": 3}, "data must be the path of a folder .*, got a value of type int"),
        ({"retrained": "none.json"}, "the retrained model's result none.json cannot be read: No such file"),
        ({"retrained": 3}, "retrained must be"),
        ({"first": 0}, "first must be a whole number, 1 or more, got 0"),
        ({"split": "forget20"}, "split must be one of .*, got 'forget20': did you mean \"forget"),
        (
            {"split": "forget05"},
            r"has no forget05_perturbed \(\.jsonl, \.json, \.parquet\): wanted are the files forget05_",
        ),
        ({"template": "chat"}, "this tokenizer has none: choose plain or none"),
        ({"progress": 1}, "progress must be True or False"),
        ({"firsts": 1}, "bench has no option 'firsts': did you mean \"first\""),
    ],
)
def test_a_wrong_argument_is_one_sentence(answers, data, change, message):
    """What is wanted and what came."""
    arguments = {"benchmark": "tofu", "model": answers.model, "data": data, "tokenizer": answers.tokenizer} | change
    with pytest.raises((ArgumentError, DataError, ModelError), match=message) as error:
        pyunlearn.bench(**arguments)
    assert "\n" not in str(error.value)


def edited(rows, **columns):
    """Return rows of which the second has other columns; None takes one away."""
    second = {key: value for key, value in (rows[1] | columns).items() if value is not None}
    return [rows[0], second, *rows[2:]]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"perturbed_answer": None}, 'line 2, has no "perturbed_answer", which the benchmark needs'),
        (
            {"perturbed_answer": "one"},
            'line 2, must have a list of texts as "perturbed_answer", and has a value of type str',
        ),
        ({"perturbed_answer": []}, 'line 2, must have a list of texts as "perturbed_answer", and has an empty list'),
        ({"perturbed_answer": ["one"]}, 'line 2, has 1 texts as "perturbed_answer", and the first row has 3'),
        ({"perturbed_answer": ["a", "b", 3]}, 'line 2, must have a string as "perturbed_answer"'),
        ({"answer": "?!"}, 'line 2, has a "answer" without Latin letter or digit'),
        ({"answer": " "}, 'line 2, has an empty "answer"'),
        ({"question": None}, 'line 2, has no "question"'),
        ({"paraphrased_answer": None}, "line 2, has other columns than the first row: paraphrased_answer in all"),
    ],
)
def test_a_wrong_row_is_one_sentence(answers, rows, data, columns, message):
    """With its file and line."""
    write(data / "forget10_perturbed.jsonl", edited(rows["forget10_perturbed"], **columns))
    with pytest.raises(DataError, match=message) as error:
        bench(answers, data)
    assert "forget10_perturbed.jsonl" in str(error.value)


def test_two_files_of_one_set_are_refused(answers, data):
    """Which of them is meant is not known."""
    (data / "retain_perturbed.json").write_text("[]")
    with pytest.raises(DataError, match=r"has retain_perturbed\.jsonl and retain_perturbed\.json: remove or rename"):
        bench(answers, data)


def test_files_as_the_hub_has_them(answers, rows, data):
    """JSON lines in files that end in .json."""
    first = bench(answers, data, first=2, max_new_tokens=1)
    for path in data.iterdir():
        path.rename(path.with_suffix(".json"))
    second = bench(answers, data, first=2, max_new_tokens=1)
    np.testing.assert_equal(first.numbers, second.numbers)
    assert second.sets["retain"]["file"] == "retain_perturbed.json"
    assert first.sets["retain"]["sha256"] == second.sets["retain"]["sha256"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "is no JSON"),
        ("[1]", "has no numbers of a benchmark"),
        ({"benchmark": "wmdp"}, "is of the benchmark 'wmdp': wanted one of tofu"),
        ({"rendering": "other"}, "has the questions in another form, other, and here they are read as"),
        ({"sets": {"forget": {"sha256": "0", "questions": 5}}}, "is of other questions of the set forget, 5 and not 2"),
        ({"sets": {}}, "is of other questions of the set forget"),
        ({"numbers": {}}, "is damaged"),
        ({"numbers": {"forget": {}}}, "is damaged"),
        ({"numbers": {"forget": {"correct": [-1.0, -1.0], "wrong": [-1.0, -1.0]}}}, "is damaged"),
        ({"numbers": {"forget": {"correct": [-1.0, None], "wrong": [[-1.0], [-1.0]]}}}, "is damaged"),
        ({"numbers": {"forget": {"correct": ["a"], "wrong": [[1]]}}}, "is damaged"),
        ({"numbers": {"forget": {"correct": [-1.0], "wrong": [[-1.0]]}}}, "is damaged"),
    ],
)
def test_a_result_that_does_not_fit_is_refused(answers, data, tmp_path, change, message):
    """Other questions, another rendering, another file: the p-value would be wrong, and look right."""
    options = {"first": 2, "max_new_tokens": 1}
    content = bench(answers, data, **options).to_dict()
    path = tmp_path / "other.json"
    path.write_text(change if isinstance(change, str) else json.dumps(content | change))
    with pytest.raises((ArgumentError, DataError), match=message):
        bench(answers, data, retrained=path, **options)


def test_a_result_of_another_template_of_the_same_name_is_refused(answers, data, tmp_path):
    """A file's name does not tell what the template writes."""
    options, paths = {"first": 2, "max_new_tokens": 1}, [tmp_path / name / "chat.jinja" for name in "ab"]
    for path, mark in zip(paths, ("", "!"), strict=True):
        path.parent.mkdir()
        path.write_text(f"{{% for m in messages %}}{{{{ m['content'] }}}}{mark} {{% endfor %}}")
    result = tmp_path / "retrained.json"
    result.write_text(json.dumps(bench(answers, data, template=paths[0], **options).to_dict()))
    bench(answers, data, retrained=result, template=paths[0], **options)
    with pytest.raises(ArgumentError, match=r"in another form, the chat template chat.jinja \(SHA-256 "):
        bench(answers, data, retrained=result, template=paths[1], **options)


def test_broken_weights_are_refused(answers, data):
    """NaN is no number of a benchmark."""
    model = answers.fresh()
    model.transformer.h[0].mlp.c_fc.weight.data.fill_(float("nan"))
    with pytest.raises(ModelError, match="the model gives text NaN or Inf as log-likelihood"):
        bench(replace(answers, model=model), data, first=1)


def test_an_answer_that_is_longer_than_the_context_is_refused(answers, rows, data):
    """A benchmark's texts are not cut."""
    long = edited(rows["forget10_perturbed"], answer="the sea and the road " * 30)
    write(data / "forget10_perturbed.jsonl", long)
    with pytest.raises(
        DataError, match=r"forget answer 2 has \d+ tokens with what stands before it, .* has 64: a bench"
    ):
        bench(answers, data)


def test_encoder_decoder_models_are_measured(t5, data, tmp_path):
    """The letters of a multiple choice too."""
    result = bench(t5, data, first=1, max_new_tokens=2)
    assert len(result.columns) == 13
    choices = {"question": "1 + 1?", "choices": ["1", "2", "3", "4"], "answer": 1}
    write(tmp_path / "wmdp-bio.jsonl", [choices])
    made = pyunlearn.bench("wmdp", t5.model, tmp_path, tokenizer=t5.tokenizer, progress=False)
    assert made.numbers["bio"]["log_likelihood"].shape == (1, 4)
    assert np.isfinite(made.numbers["bio"]["log_likelihood"]).all()
