"""Tasks in YAML for lm-evaluation-harness on local files: a choice, an answer that is written, and a perplexity."""

import json
import random

import pytest
import tiny

CHOICE = """
task: rooms
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/rooms.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: "{delimiter}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
WRITTEN = """
task: endings
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/rooms.jsonl
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}\\n"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs:
  until: ["."]
  max_gen_toks: 12
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
ROLLING = """
task: fluency
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/rooms.jsonl
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{choices[answer]}}}}"
metric_list:
  - metric: word_perplexity
    aggregation: weighted_perplexity
    higher_is_better: false
"""
GROUP = """
group: house
task:
  - rooms
  - attic
aggregate_metric_list:
  - metric: acc
    aggregation: mean
    weight_by_size: true
"""


def rows(facts, seed=0):
    """Return documents: the question, four answers of which one is the fact's own, and its index."""
    r, others = random.Random(seed), [fact["answer"] for fact in tiny.facts(60, 900)]
    made = []
    for fact in facts:
        choices = [fact["answer"], *r.sample(others, 3)]
        r.shuffle(choices)
        made.append({"question": fact["question"], "choices": choices, "answer": choices.index(fact["answer"])})
    return made


def task_folder(folder, facts):
    """Write the tasks and their documents; return the folder."""
    folder.mkdir()
    documents = rows(facts)
    (folder / "rooms.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    for name, text in {"rooms": CHOICE, "endings": WRITTEN, "fluency": ROLLING}.items():
        (folder / f"{name}.yaml").write_text(text.format(folder=folder, delimiter="\\n"))
    return folder


def own_copies(monkeypatch, folder):
    """Keep the copies that datasets makes of local files in a folder of the test's own."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
