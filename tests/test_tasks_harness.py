"""Tasks of lm-evaluation-harness, run by lm-eval: the numbers, the model as it was, errors, audit and compare."""

import json
import random
import re

import numpy as np
import pytest
import task_files
import tiny
import torch
from test_documents import ROOT, blocks
from torch.nn.functional import log_softmax

import pyunlearn
from pyunlearn.comparing import Comparison
from pyunlearn.errors import ArgumentError, DataError, ModelError, OutputError
from pyunlearn.models import harness
from pyunlearn.models.harness import HarnessTasks
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.probes.tasks import shown, task_scores
from pyunlearn.progress import Progress

pytest.importorskip("lm_eval")
QUIET = Progress(False)


@pytest.fixture
def folder(answers, tmp_path, monkeypatch):
    """Tasks and their documents: of the two facts that the model knows, and 18 of its retain set."""
    pytest.importorskip("lm_eval")
    task_files.own_copies(monkeypatch, tmp_path)
    return task_files.task_folder(tmp_path / "tasks", answers.forget + answers.retain[:18])


def loaded(answers, *names, limit=None):
    """The tasks for the model of `answers`."""
    return HarnessTasks(list(map(str, names)), limit, answers.model, answers.tokenizer, QUIET)


def run_on(tasks, answers, model=None, batch_size=4):
    """Their run on a model."""
    lm = LanguageModel.of(answers.model if model is None else model, answers.tokenizer)
    return tasks.run(lm, batch_size=batch_size, bar=QUIET, who="the model")


def log_likelihood(model, tokenizer, context, answer):
    """The summed log-likelihood of an answer after a context, by a plain loop."""
    before, whole = (tokenizer(text)["input_ids"] for text in (context, context + answer))
    with torch.no_grad():
        logits = log_softmax(model(torch.tensor([whole])).logits[0].double(), dim=-1)
    return sum(logits[i - 1, whole[i]].item() for i in range(len(before), len(whole)))


@pytest.mark.full
def test_the_numbers_are_those_of_a_plain_loop(answers, folder):
    """Accuracy of each document, and the perplexity; the first documents alone where there is a limit."""
    run = run_on(loaded(answers, folder / "rooms.yaml", folder / "fluency.yaml"), answers)
    choice, fluency = run.numbers
    model, tokenizer = answers.model.eval(), answers.tokenizer
    documents = [json.loads(line) for line in (folder / "rooms.jsonl").read_text().splitlines()]
    right = []
    for row in documents:
        sums = [log_likelihood(model, tokenizer, row["question"], "\n" + answer) for answer in row["choices"]]
        right.append(float(np.argmax(sums) == row["answer"]))
    assert choice.items == right
    assert choice.value == np.mean(right)
    assert 0 < choice.value < 1
    texts = [row["choices"][row["answer"]] for row in documents]
    end = tokenizer.eos_token  # lm-eval's own beginning of a text, where a tokenizer writes none
    sums = [log_likelihood(model, tokenizer, tokenizer.bos_token or end, text) for text in texts]
    wanted = np.exp(-sum(sums) / sum(len(re.split(r"\s+", text)) for text in texts))
    np.testing.assert_allclose(fluency.value, wanted, rtol=1e-5)
    few = run_on(loaded(answers, folder / "rooms.yaml", limit=7), answers).numbers[0]
    assert (few.items, few.documents, few.available) == (right[:7], 7, 20)


@pytest.mark.full
def test_the_model_and_the_program_are_as_they_were(answers, folder, capfd):
    """Weights, tied or not, mode, hooks, gradients, tokenizer and random numbers; and nothing is printed."""
    model = answers.fresh()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() * 1.01)  # untied by hand
    model.train()
    model.transformer.h[0].eval()
    model.transformer.wte.weight.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    pad, side = answers.tokenizer.pad_token, answers.tokenizer.padding_side
    random.seed(5), np.random.seed(5), torch.manual_seed(5)  # noqa: NPY002
    tasks = loaded(answers, *(folder / f"{name}.yaml" for name in ("rooms", "endings", "fluency")))
    run_on(tasks, answers, model)
    drawn = random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002
    random.seed(5), np.random.seed(5), torch.manual_seed(5)  # noqa: NPY002
    assert drawn == (random.random(), np.random.rand(), torch.rand(1).item())  # noqa: NPY002
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    assert model.lm_head.weight is not model.transformer.wte.weight
    assert [module.training for module in model.modules()] == modes
    assert not model.transformer.wte.weight.requires_grad
    assert model.lm_head.weight.requires_grad
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert "tie_weights" not in vars(model)
    assert (answers.tokenizer.pad_token, answers.tokenizer.padding_side) == (pad, side)
    assert pad is None
    assert capfd.readouterr() == ("", "")


@pytest.mark.full
def test_an_adapter_counts(answers, folder):
    """A model with LoRA has the numbers of the model into which it is merged, and not those of the model below it."""
    peft = pytest.importorskip("peft")
    tasks, below = loaded(answers, folder / "fluency.yaml"), run_on(loaded(answers, folder / "fluency.yaml"), answers)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    model = peft.get_peft_model(answers.fresh(), config)
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.5)
    own = run_on(tasks, answers, model).numbers[0].value
    merged = run_on(tasks, answers, model.merge_and_unload()).numbers[0].value
    np.testing.assert_allclose(own, merged, rtol=1e-4)
    assert abs(own / below.numbers[0].value - 1) > 0.05


@pytest.mark.full
def test_an_encoder_decoder_runs_too(t5, folder):
    """What it writes, and the choice, of a T5."""
    lm = LanguageModel.of(t5.model, t5.tokenizer)
    names = [str(folder / f"{name}.yaml") for name in ("rooms", "endings")]
    run = HarnessTasks(names, 5, lm, None, QUIET).run(lm, batch_size=4, bar=QUIET, who="the model")
    assert [(x.metric, x.documents) for x in run.numbers] == [("acc", 5), ("exact_match", 5)]


@pytest.mark.full
def test_a_task_that_fails_leaves_nothing(answers, folder, call, tmp_path):
    """The command ends with its sentence before the texts are read by the model; no folder is left half-written."""
    answers.model.save_pretrained(tmp_path / "model")
    answers.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers.forget))
    text = (folder / "endings.yaml").read_text().replace("max_gen_toks: 12", "max_gen_toks: 300")
    (folder / "endings.yaml").write_text(text)
    before = sorted(path.name for path in tmp_path.iterdir())
    for command in (("audit",), ("compare", "--methods", "ga")):
        words = ("model", "--forget", "forget.jsonl", "--tasks", "tasks/endings.yaml", "--out", "out")
        code, out, err = call(*command, *words)
        assert (code, out) == (2, "")
        assert err.startswith("pyunlearn: lm-eval cannot run the tasks 'endings' on the ")
        assert sorted({path.name for path in tmp_path.iterdir()} - {"datasets"}) == before


@pytest.mark.full
def test_two_models_read_the_same_documents(answers, folder):
    """Those of a task that shuffles them, and solved examples that are drawn; texts beyond the context are counted."""
    (folder / "shuffled.py").write_text(
        "import random\n\ndef mixed(data):\n    return data.select(random.sample(range(len(data)), 9))\n"
    )
    text = (folder / "rooms.yaml").read_text().replace("task: rooms", "task: drawn")
    extra = "process_docs: !function shuffled.mixed\nnum_fewshot: 3\nfewshot_split: test\n"
    (folder / "drawn.yaml").write_text(text + extra)
    tasks = loaded(answers, folder / "drawn.yaml")
    first, second = (run_on(tasks, answers, batch_size=size) for size in (2, 4))
    assert first.numbers[0].keys == second.numbers[0].keys
    assert first.numbers[0].items == second.numbers[0].items
    assert first.requests == 36
    assert 0 < first.cut <= 36  # 64 positions
    assert not np.isnan(task_scores(first, second)[0].change.low)


@pytest.mark.full
def test_a_group_shows_its_number_and_keeps_its_tasks(answers, folder):
    """The mean over all documents has their interval; each task is part of the group."""
    attic = (folder / "rooms.yaml").read_text().replace("task: rooms", "task: attic")
    lines = (folder / "rooms.jsonl").read_text().splitlines(keepends=True)
    (folder / "attic.jsonl").write_text("".join(lines[:5]))
    (folder / "attic.yaml").write_text(attic.replace("rooms.jsonl", "attic.jsonl"))
    (folder / "house.yaml").write_text(task_files.GROUP)
    run = run_on(loaded(answers, folder / "house.yaml"), answers)
    scores = task_scores(run, run)
    assert [(s.task, s.part_of, s.documents) for s in scores] == [
        ("house", None, 25),
        ("rooms", "house", 20),
        ("attic", "house", 5),
    ]
    assert [s.task for s in shown(scores)] == ["house"]
    np.testing.assert_allclose(25 * scores[0].now.estimate, 20 * scores[1].now.estimate + 5 * scores[2].now.estimate)
    assert not np.isnan([scores[0].now.low, scores[0].change.low]).any()


@pytest.mark.full
def test_the_task_in_the_documents_runs(answers, folder, tmp_path, monkeypatch):
    """The YAML of docs/tasks.md, with a file of the name and columns that it wants."""
    (block,) = blocks(ROOT / "docs" / "tasks.md", ("yaml",))
    (folder / "world_facts.yaml").write_text(block)
    (folder / "rooms.jsonl").rename(tmp_path / "world_facts.jsonl")
    monkeypatch.chdir(tmp_path)
    run = run_on(loaded(answers, folder / "world_facts.yaml"), answers)
    assert [(x.metric, x.documents) for x in run.numbers] == [("acc", 20), ("acc_norm", 20)]
    assert all(x.items is not None for x in run.numbers)


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("none.yaml", None, DataError, r"^the task's file .*none\.yaml was not found: check its path$"),
        (
            "rooms.yaml",
            ("rooms.jsonl", "gone.jsonl"),
            DataError,
            r"^task '.*' cannot be loaded by lm-eval: FileNot",
        ),
        ("rooms.yaml", ("output_type: multiple_choice", "output_type: ["), DataError, "cannot be loaded by lm-eval: "),
        ("rooms.yaml", ("doc_to_target: answer", "doc_to_target: '{{9 / 0}}'"), DataError, "ZeroDivisionError"),
        ("endings.yaml", ("max_gen_toks: 12", "max_gen_toks: 300"), ModelError, r"^lm-eval cannot run the tasks .*300"),
    ],
)
def test_what_cannot_be_loaded_or_run_is_one_sentence(answers, folder, name, content, error, message):
    """It names the task and what is wrong."""
    if content is not None:
        text = (folder / name).read_text()
        assert content[0] in text
        (folder / name).write_text(text.replace(*content))
    with pytest.raises(error, match=message) as caught:
        run_on(loaded(answers, folder / name), answers)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.full
def test_unknown_twice_or_dangerous_tasks_are_refused(answers, folder):
    """A near name is offered; code that a model writes is not run; a task with data on the hub says so offline."""
    with pytest.raises(ArgumentError, match=r"^task 'hellaswg' is none that lm-eval .* did you mean \"hellaswag\"\?$"):
        loaded(answers, "hellaswg")
    assert harness._unknown("?", ["hellaswag"]).endswith("`lm-eval ls tasks` lists them; a file's name ends with .yaml")
    (folder / "hub.yaml").write_text(
        (folder / "rooms.yaml").read_text().replace("path: json", "path: nobody/none").replace("data_files", "data_dir")
    )
    with pytest.raises(DataError, match=r"^task '.*hub.yaml' cannot be loaded by lm-eval: "):
        loaded(answers, folder / "hub.yaml")
    with pytest.raises(ArgumentError, match=r"^task 'rooms' comes twice in tasks, by "):
        loaded(answers, folder / "rooms.yaml", folder / ".." / "tasks" / "rooms.yaml")
    code = (folder / "rooms.yaml").read_text() + "unsafe_code: true\n"
    (folder / "code.yaml").write_text(code)
    with pytest.raises(ArgumentError, match=r"^task 'rooms' runs code that the model writes"):
        loaded(answers, folder / "code.yaml")


# ---------------------------------------------------------------- audit and compare


@pytest.mark.full
def test_audit_shows_the_tasks_of_both_models(answers, folder, call, tmp_path):
    """In the table, audit.json and the page; no word of a document is written."""
    other = answers.fresh()
    tiny.train(other, answers.tokenizer, answers.forget, epochs=3)
    for name, model in (("original", answers.model), ("model", other)):
        model.save_pretrained(tmp_path / name)
        answers.tokenizer.save_pretrained(tmp_path / name)
    for role, rows in (("forget", answers.forget), ("holdout", answers.holdout)):
        (tmp_path / f"{role}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    word = "zephrandine"
    lines = (folder / "rooms.jsonl").read_text().replace("keep in room", f"keep in {word} room")
    (folder / "rooms.jsonl").write_text(lines)
    words = ("audit", "model", "--original", "original", "--forget", "forget.jsonl", "--holdout", "holdout.jsonl")
    tasks = ("--tasks", f"tasks/rooms.yaml,{folder}/fluency.yaml", "--task-limit", 12, "--html", "--fast")
    code, out, err = call(*words, *tasks, "--out", "out")
    assert code in (0, 1), err
    assert "the first documents of each task, 12 at most" in out
    assert re.search(r"rooms +12 of 20 +0\.\d{3} +0\.\d{3} \[0\.\d{3}, \d\.\d{3}\] +[+-]0\.\d{3} \[", out)
    assert "lower is better: word_perplexity" in out
    content = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert [(x["task"], x["metric"], x["documents"]) for x in content["tasks"]] == [
        ("rooms", "acc", 12),
        ("fluency", "word_perplexity", 12),
    ]
    assert content["tasks"][0]["change"]["low"] < content["tasks"][0]["change"]["high"]
    assert content["settings"]["tasks"] == ["tasks/rooms.yaml", "fluency.yaml"]
    assert content["settings"]["lm_eval"] == harness.lm_eval_version()
    page = (tmp_path / "out" / "audit.html").read_text()
    assert "<h2>Other tasks</h2>" in page
    assert "rooms, acc" in page
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert written
    assert not any(word.encode() in path.read_bytes() for path in written)
    assert word not in out + err


@pytest.mark.full
def test_compare_has_a_column_for_each_task(answers, folder, call, tmp_path):
    """The original's number, and each method's with its change; a resumed comparison needs the same documents."""
    options = {"methods": ["ga"], "max_steps": 2, "tasks": [str(folder / "rooms.yaml")], "progress": False}
    roles = {"retain": answers.retain, "holdout": answers.holdout, "tokenizer": answers.tokenizer}
    made = pyunlearn.compare(answers.model, answers.forget, output_dir=tmp_path / "out", **roles, **options)
    (row,) = made.rows
    (original,), (score,) = made.original.tasks, row.calibrated.tasks
    assert row.uncalibrated.tasks == []
    assert original.before is original.change is None
    assert score.before == original.now
    np.testing.assert_allclose(score.change.estimate, score.now.estimate - original.now.estimate)
    read = Comparison.read(tmp_path / "out")
    assert read.rows[0].calibrated.tasks == row.calibrated.tasks
    head, first, second = (tmp_path / "out" / "table.csv").read_text().splitlines()
    columns = head.split(",")
    assert first.split(",")[columns.index("rooms_acc")] == str(original.now.estimate)
    assert second.split(",")[columns.index("rooms_acc_change_low")] == str(score.change.low)
    lines = (folder / "rooms.jsonl").read_text().splitlines(keepends=True)
    (folder / "rooms.jsonl").write_text("".join(lines[:9]))
    with pytest.raises(OutputError, match="was made with other documents of the task rooms: give the same"):
        pyunlearn.compare(answers.model, answers.forget, output_dir=tmp_path / "out", **roles, **options)
    answers.model.save_pretrained(tmp_path / "model")
    answers.tokenizer.save_pretrained(tmp_path / "model")
    for role, rows in (("forget", answers.forget), ("retain", answers.retain), ("holdout", answers.holdout)):
        (tmp_path / f"{role}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--forget", "forget.jsonl", "--retain", "retain.jsonl", "--holdout", "holdout.jsonl", "--max-steps", 2)
    tasks = ("--methods", "ga", "--tasks", "tasks/rooms.yaml", "--out", "again")
    code, out, err = call("compare", "model", *words, *tasks)
    assert code == 0, err
    assert re.search(r"method +acc *\n", out)
    assert re.search(r"original +0\.\d{3} *\n", out)
    assert re.search(r"ga +0\.\d{3} *\n +[+-]0\.\d{3} \[", out)
