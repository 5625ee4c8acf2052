"""Benchmarks: TOFU's own logs are met, the numbers are those of a plain loop, and what the command prints."""

import gzip
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import hmean, ks_2samp
from test_documents import ROOT, blocks
from tofu_folder import bench, tofu_folder, tofu_rows, write

import pyunlearn
from pyunlearn.benchmarking import BenchConfig, Column
from pyunlearn.benchmarking.measurer import Measurer
from pyunlearn.benchmarking.tofu import columns
from pyunlearn.data import encode, read_examples
from pyunlearn.errors import OutputError
from pyunlearn.progress import Progress

LOGS = Path(__file__).parent / "tofu_logs.json.gz"
"""Numbers of each question, to 6 digits, of two Llama-2-7B of TOFU (MIT licence): eval_log_aggregated.json in
data/ft_epoch5_lr1e-05_llama2-7b_full_wd0.01/eval_results/ds_size300 and in that of retain90, github.com/locuslab/tofu
at commit 8c49eee."""
SETS = {
    "eval_log_forget.json": "forget",
    "eval_log.json": "retain",
    "eval_real_author_wo_options.json": "real authors",
    "eval_real_world_wo_options.json": "world facts",
}
PUBLISHED = {
    ("full", "geometric"): [
        0.990939, 0.985450, 0.515985, 0.989527, 0.985655, 0.474699, 0.455482, 0.933000, 0.596229,
        0.418562, 0.882479, 0.539033, 0.622677,
    ],
    ("full", "arithmetic"): [
        0.990939, 0.985450, 0.530370, 0.989527, 0.985655, 0.453867, 0.455482, 0.933000, 0.505160,
        0.418562, 0.882479, 0.423055, 0.585886,
    ],
    ("retain90", "geometric"): [
        0.147563, 0.408244, 0.674019, 0.988897, 0.975811, 0.470977, 0.434087, 0.923000, 0.570681,
        0.414326, 0.897436, 0.544198, 0.613745,
    ],
    ("retain90", "arithmetic"): [
        0.147563, 0.408244, 0.679652, 0.988897, 0.975811, 0.449594, 0.434087, 0.923000, 0.478510,
        0.414326, 0.897436, 0.420057, 0.575240,
    ],
}  # fmt: skip
"""Output of that commit's aggregate_eval_stat.py (geometric) and utils.py (arithmetic) for the whole logs: probability,
ROUGE and truth ratio of each set, and model utility."""
QUALITY = (0.39666667, 1.834066e-21)
"""Distance and p-value of the full model against retain90, of both scripts."""


def logged(model):
    """Return the logs of a model as `columns` takes them: losses are negative log-likelihoods."""
    content = json.loads(gzip.decompress(LOGS.read_bytes()))[model]
    return {
        name: {
            "answer": -np.array(content[file]["avg_gt_loss"]),
            "correct": -np.array(content[file]["avg_paraphrased_loss"]),
            "wrong": -np.array(content[file]["average_perturb_loss"]),
            "rouge": np.array(content[file]["rougeL_recall"]),
        }
        for file, name in SETS.items()
    }


@pytest.mark.parametrize(("model", "mean"), PUBLISHED)
def test_the_published_logs_of_tofu_are_met(model, mean):
    """Every column, of both definitions in TOFU's code, to 1e-5; the issue wants 1e-3."""
    made = columns(logged(model), logged("retain90"), BenchConfig(wrong_answers=mean))
    *own, p, distance = made
    assert [c.name for c in own[:3]] == ["forget_probability", "forget_rouge", "forget_truth_ratio"]
    np.testing.assert_allclose([c.estimate for c in own], PUBLISHED[model, mean], atol=1e-5)
    assert [c.questions for c in own] == [300] * 6 + [100] * 3 + [117] * 3 + [517]
    assert all(c.low < c.estimate < c.high for c in own)
    wanted = QUALITY if model == "full" else (0.0, 1.0)
    np.testing.assert_allclose([distance.estimate, p.estimate], wanted, rtol=1e-5)
    reach = 2 * np.sqrt(np.log(80) / 600)
    np.testing.assert_allclose([distance.low, distance.high], [max(0, wanted[0] - reach), wanted[0] + reach])


def test_the_interval_of_the_distance_covers():
    """Of samples of two laws whose distance is known, or of the same, at least 95 % of intervals hold it."""
    rng, inside = np.random.default_rng(0), 0
    for shift in (0.0, 0.5):
        truth = 2 * torch.distributions.Normal(0, 1).cdf(torch.tensor(shift / 2)).item() - 1
        for _ in range(15):
            sides = [
                {"correct": -5 - rng.normal(mean, 1, 60).clip(-4, 4), "wrong": np.full((60, 1), -5.0)}
                for mean in (0, shift)
            ]
            numbers = {"forget": sides[0] | {"answer": sides[0]["correct"], "rouge": np.full(60, 0.5)}}
            for name in ("retain", "real authors", "world facts"):
                numbers[name] = {key: x[:6] for key, x in numbers["forget"].items()}
            distance = _quality(numbers, sides[1])
            inside += distance.low <= truth <= distance.high
    assert inside >= 0.95 * 30


def _quality(numbers, retrained):
    from pyunlearn.benchmarking.tofu import _forget_quality

    return _forget_quality(numbers["forget"], retrained)[1]


# ---------------------------------------------------------------- a tiny model


@pytest.fixture(scope="module")
def known(answers):
    """The GPT-2 of tests/tiny.py, trained until it recites its two forget records."""
    model = answers.fresh()
    tiny.train(model, answers.tokenizer, answers.forget * 4, epochs=30, learning_rate=1e-3)
    return replace(answers, model=model)


@pytest.fixture(scope="module")
def rows(answers):
    """The rows of TOFU's four files."""
    return tofu_rows(answers)


@pytest.fixture
def data(rows, tmp_path):
    """A folder like TOFU's."""
    return tofu_folder(tmp_path / "TOFU", rows)


@pytest.fixture
def saved(known, answers, tmp_path):
    """Models in folders: "model", which knows the forget records, and "retrained", which knows them less."""
    for name, each in (("model", known), ("retrained", answers)):
        for part in (each.fresh(), each.tokenizer):
            part.save_pretrained(tmp_path / name)
    return tmp_path


def greedy(trained, question, context=64):
    """Return what a plain loop over the logits writes after a question, in the rendering "none"."""
    ids = trained.tokenizer(f"{question}\n")["input_ids"]
    start = len(ids)
    while len(ids) < context and ids[-1] != trained.tokenizer.eos_token_id:
        with torch.no_grad():
            ids.append(int(trained.model(torch.tensor([ids])).logits[0, -1].argmax()))
    return trained.tokenizer.decode(ids[start:], skip_special_tokens=True)


def direct(trained, rows):
    """Return TOFU's columns by numpy, scipy and rouge-score alone, and the forget set's truth ratios."""
    out, utility, ratios = {}, [], {}
    for name, each in zip(SETS.values(), rows.values(), strict=True):

        def loss(answers, each=each):
            pairs = [{"question": row["question"], "answer": answer} for row, answer in zip(each, answers, strict=True)]
            return tiny.negative_log_likelihoods(trained, pairs, trained.model)

        answer = np.exp(-loss([row["answer"] for row in each]))
        correct = loss([row.get("paraphrased_answer", row["answer"]) for row in each])
        wrong = np.stack([loss([row["perturbed_answer"][k] for row in each]) for k in range(3)], axis=1)
        ratio = ratios[name] = np.exp(correct - wrong.mean(1))
        if name in ("real authors", "world facts"):
            answer = answer / (answer + np.exp(-wrong).sum(1))
        scorer = RougeScorer(["rougeL"], use_stemmer=True)
        rouge = [scorer.score(row["answer"], greedy(trained, row["question"]))["rougeL"].recall for row in each]
        value = np.minimum(ratio, 1 / ratio) if name == "forget" else np.maximum(0, 1 - ratio)
        parts = [float(np.mean(x)) for x in (answer, rouge, value)]
        names = [f"{name} {measure}".replace(" ", "_") for measure in ("probability", "rouge", "truth ratio")]
        out |= dict(zip(names, parts, strict=True))
        utility += [] if name == "forget" else parts
    return out | {"model_utility": hmean(utility)}, ratios["forget"]


@pytest.mark.full
def test_the_columns_are_those_of_a_plain_loop(known, answers, rows, data):
    """Likelihoods, greedy answers of any length, aggregates and the test; the memorized answers are recited."""
    result = bench(known, data, retrained=answers.model)
    (wanted, ratios), (_, others) = direct(known, rows), direct(answers, rows)
    test = ks_2samp(ratios, others)
    wanted |= {"forget_quality": test.pvalue, "forget_quality_distance": test.statistic}
    assert result.columns.keys() == wanted.keys()
    for name, value in wanted.items():
        assert result[name].estimate == pytest.approx(value, abs=1e-5), name
    assert result.numbers["forget"]["rouge"][:2].tolist() == [1, 1]
    assert np.exp(result.numbers["forget"]["answer"][:2]).min() > 0.8
    assert result["forget_probability"].questions == 8
    assert result.notes == []


def test_answers_are_written_to_their_end(known, data):
    """However short the true ones are: a model answers "Paris" with a sentence."""
    pairs = [("what does the king keep in room 706?", "a"), ("what does a dog keep in room 999?", "the")]
    with Progress(False) as bar:
        measurer = Measurer(known.model, known.tokenizer, BenchConfig(template="none"), bar, "the model")
        written = measurer.written(pairs, "answer", 200)
        cut = measurer.written(pairs, "answer", 3)
    assert written == [greedy(known, question) for question, _ in pairs]
    assert all(len(known.tokenizer(short)["input_ids"]) <= 3 for short in cut)
    assert all(text.startswith(short) and len(text) > len(short) for text, short in zip(written, cut, strict=True))


def test_what_is_written_for_a_question_does_not_depend_on_the_others(answers):
    """A long question leaves itself alone less room in the context; a note says how many answers filled it."""
    torch.manual_seed(0)
    babbling = replace(answers, model=tiny.tiny_gpt2(len(answers.tokenizer)).eval())  # ends no answer
    questions = ["what does the king keep in room 706?", "what does a dog keep in room 999? " * 3]
    with Progress(False) as bar:
        measurer = Measurer(babbling.model, babbling.tokenizer, BenchConfig(), bar, "the model")
        written = measurer.continued([f"{question}\n" for question in questions], "forget answer", 200)
    assert written == [greedy(babbling, question) for question in questions]
    assert len(measurer.notes) == 1
    assert measurer.notes[0].startswith("2 of 2 forget answers filled the model's context of 64 tokens before the 200")


def test_the_first_questions_are_those_of_each_set(known, rows, data):
    """And the same as of files that have no more; an interval of fewer than six has no ends for the utility."""
    part = bench(known, data, first=3)
    for name, each in rows.items():
        write(data / f"{name}.jsonl", each[:3])
    whole = bench(known, data)
    assert [c.questions for c in part.columns.values()] == [3] * 12 + [9]
    assert part.columns.keys() == whole.columns.keys()
    assert part.sets == whole.sets
    np.testing.assert_equal(part.numbers, whole.numbers)
    assert np.isnan(part["model_utility"].low)
    assert part.to_dict()["columns"]["model_utility"]["low"] is None
    assert part.notes[0].startswith("Forget quality compares with a model retrained without the forget set")


def test_a_chat_template_renders_the_questions(data, rows):
    """By default where there is one; the numbers are those of the messages."""
    tokenizer = tiny.make_tokenizer(chat=True)
    torch.manual_seed(0)
    model = tiny.tiny_llama(len(tokenizer)).eval()
    made = tiny.Tiny(model, tokenizer, [], [], [], [])
    result = bench(made, data, template="default", first=2, max_new_tokens=2)
    assert re.fullmatch(r"the tokenizer's chat template \(SHA-256 [0-9a-f]{12}\)", result.rendering)
    pairs = rows["forget10_perturbed"][:2]
    messages = [
        {"messages": [{"role": r, "content": row[k]} for r, k in (("user", "question"), ("assistant", "answer"))]}
        for row in pairs
    ]
    tokens = encode(read_examples(messages, role="x", turns="last"), tokenizer, role="x", max_length=None)
    wanted = []
    for t in tokens:
        with torch.no_grad():
            logits = model(torch.tensor([t.ids])).logits[0, t.first - 1 : -1]
        wanted.append(-torch.nn.functional.cross_entropy(logits, torch.tensor(t.scored)).item())
    np.testing.assert_allclose(result.numbers["forget"]["answer"], wanted, atol=1e-5)
    plain = bench(made, data, template="plain", first=2, max_new_tokens=2)
    assert plain.rendering == '"Question: ... Answer: ..."'
    assert abs(plain.numbers["forget"]["answer"] - wanted).min() > 1e-3


def test_a_part_that_is_0_leaves_the_utility_open():
    """Its interval reaches as far as the parts' intervals: no resample of zeros could say more."""
    numbers = logged("full")
    numbers["retain"]["rouge"] = np.zeros(300)
    made = {c.name: c for c in columns(numbers, None, BenchConfig())}
    assert made["model_utility"].estimate == made["model_utility"].low == 0
    assert 0 < made["model_utility"].high < 9 * made["retain_rouge"].high


# ---------------------------------------------------------------- the command


@pytest.mark.full
def test_the_command_prints_the_table_and_writes_the_numbers(call, saved, data, answers):
    """bench.json is what --json prints, has no text, and serves as the retrained model's result."""
    options = ("--data", data, "--template", "none", "--quiet", "--max-new-tokens", 8)
    code, out, err = call("bench", "tofu", saved / "retrained", *options, "--out", "own", "--json")
    assert (code, err) == (0, "")
    content = json.loads(Path("own/bench.json").read_text())
    assert content == json.loads(out)
    assert content["settings"]["model"] == "retrained"
    assert not [row for row in answers.forget if row["answer"] in out or row["question"] in out]
    assert [path.name for path in Path("own").iterdir()] == ["bench.json"]

    tables = []
    for retrained in ("own/bench.json", saved / "retrained"):
        code, out, err = call("bench", "tofu", saved / "model", *options, "--retrained", retrained)
        assert (code, err) == (0, "")
        tables.append(out)
    assert tables[0] == tables[1]
    lines = [line.strip() for line in tables[0].splitlines()]
    assert lines[0] == "tofu: model, read with the texts alone on lines of their own"
    assert [line.split("  ")[0] for line in lines[4:8]] == [
        "forget, 8",
        "retain, 7",
        "real authors, 6",
        "world facts, 6",
    ]
    assert re.match(r"model utility 0\.\d{3} \[\.\d{3}, \.\d{3}\]$", lines[9])
    assert re.match(r"forget quality p = 0\.\d+, log10 -\d\.\d\d; distance 0\.\d{3} \[\.\d{3}, 1\.000\]$", lines[10])

    code, out, _ = call("bench", "tofu", saved / "retrained", *options, "--retrained", "own/bench.json")
    assert code == 0
    assert "as if it were the same model: then forget quality is 1 by definition" in " ".join(out.split())


def test_the_table_fits_80_columns(call, saved, data, monkeypatch):
    """No cell is cut."""
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = call("bench", "tofu", saved / "model", "--data", data, "--first", 2, "--max-new-tokens", 1, "--quiet")
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= 80


def test_a_progress_bar_shows_the_stages(known, data, capsys):
    """On standard error, all texts of each stage counted."""
    bench(known, data, first=2, max_new_tokens=1, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "benchmarking" in err


def test_an_interrupted_benchmark_writes_nothing(call, saved, data, monkeypatch):
    """Neither file nor folder, and one sentence says so."""

    def interrupt(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("pyunlearn.benchmarking.measurer.greedy_continuations", interrupt)
    code, out, err = call("bench", "tofu", saved / "model", "--data", data, "--out", "out", "--first", 2, "--quiet")
    assert (code, out, err) == (130, "", "interrupted; nothing was written\n")
    assert not Path("out").exists()


def test_the_numbers_are_there_where_the_file_cannot_be_written(call, saved, data, monkeypatch):
    """They are shown before they are written."""

    def full(*arguments):
        raise OutputError("the disk is full")

    monkeypatch.setattr("pyunlearn.output.write_json", full)
    options = ("--data", data, "--first", 2, "--max-new-tokens", 1, "--quiet")
    code, out, err = call("bench", "tofu", saved / "model", *options, "--out", "out")
    assert (code, err) == (2, "pyunlearn: the disk is full\n")
    assert "model utility" in out


def test_a_name_of_a_column():
    """Words of set and measure, joined."""
    assert Column("", "model utility", 0.5, 0.4, 0.6, 9).name == "model_utility"


@pytest.mark.full
def test_the_python_of_the_page_runs(saved, data, monkeypatch):
    """The block of docs/bench.md, with tiny models and a folder under the names that it uses."""
    monkeypatch.chdir(saved)
    (code,) = blocks(ROOT / "docs" / "bench.md", ("python",))
    names = {"pyunlearn": pyunlearn, "model": "model", "retrained": saved / "retrained"}
    exec(compile(code, "docs/bench.md", "exec"), names)
    assert names["result"]["forget_quality"].questions == 8
