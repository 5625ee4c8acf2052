"""Utility: each number against its definition, and the optional packages behind some of them."""

import json
import math
import sys
import types

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyunlearn.errors import ArgumentError, DependencyError
from pyunlearn.metrics import COLLAPSED, bleu, chrf, collapsed, distinct_n, perplexity, repetition, task_accuracy

PROSE = [
    "when", "the", "ship", "came", "into", "the", "harbour", "nobody", "on", "the", "quay", "knew", "what", "it",
    "carried", "and", "the", "master", "would", "not", "say", "so", "the", "boys", "made", "bets", "of", "it",
    "among", "themselves", "until", "the", "crane", "began", "to", "lift", "crate", "after", "crate", "of",
    "oranges", "from", "the", "dark", "hold",
]  # fmt: skip


@given(st.lists(st.lists(st.floats(-30, 0), min_size=1, max_size=6), min_size=1, max_size=5))
def test_perplexity_weighs_every_token_alike(rows):
    """exp of the mean over all tokens; not the mean of the texts' perplexities."""
    tokens = [x for row in rows for x in row]
    found = perplexity([sum(row) for row in rows], [len(row) for row in rows])
    assert found == pytest.approx(math.exp(-sum(tokens) / len(tokens)))
    assert found >= 1


def test_perplexity_at_its_ends():
    """A uniform guess among V has perplexity V; an impossible token inf; a certain text 1."""
    assert perplexity([10 * -math.log(400)], [10]) == pytest.approx(400)
    assert perplexity([-math.inf, -1], [3, 3]) == math.inf
    assert perplexity(0.0, 5) == 1
    assert perplexity([-10.0, 0.0], [1, 9]) == pytest.approx(math.e)


@pytest.mark.parametrize(
    ("sums", "counts", "message"),
    [([1.0], [1], "0 or less"), ([-1.0], [0], "at least 1"), ([-1.0], [1, 2], "1 and 2"), ([], [], "one or more")],
)
def test_perplexity_of_nothing_is_refused(sums, counts, message):
    """Losses with the wrong sign, and texts without a token."""
    with pytest.raises(ArgumentError, match=message):
        perplexity(sums, counts)


def bleu_by_hand(written, truth):
    """Of one text with one reference: brevity penalty times the geometric mean of 1- to 4-gram precision, none of them 0."""
    w, t = written.split(), truth.split()
    logs = []
    for n in range(1, 5):
        a, b = ([tuple(x[i : i + n]) for i in range(len(x) - n + 1)] for x in (w, t))
        logs.append(math.log(sum(min(a.count(g), b.count(g)) for g in set(a)) / len(a)))
    return 100 * min(1, math.exp(1 - len(t) / len(w))) * math.exp(sum(logs) / 4)


def test_bleu_is_its_formula():
    """Clipped precisions and brevity penalty."""
    pytest.importorskip("sacrebleu")
    written, truth = "the cat sees a tree and the sea now", "the cat sees a tree and a lamp by the sea"
    assert bleu([written], [truth]) == pytest.approx(bleu_by_hand(written, truth))
    assert bleu([truth], [truth]) == pytest.approx(100)


@pytest.mark.parametrize("metric", [bleu, chrf])
def test_references_belong_to_their_text_and_may_be_several(metric):
    """sacrebleu wants them transposed: passed on as they come, text 1 would be scored against the references of text 2."""
    pytest.importorskip("sacrebleu")
    first, second = "my aunt paints the long road today", "the king hides two stones in a boat"
    assert metric([first, second], [first, second]) == pytest.approx(100)
    assert metric([first, second], [[second, first], [second]]) == pytest.approx(100)
    assert metric([first, second], [[second], [first]]) < 60
    with pytest.raises(ArgumentError, match="1 and 2"):
        metric([first], [first, second])
    with pytest.raises(ArgumentError, match="at least one reference"):
        metric([first], [[]])


@given(st.lists(st.integers(0, 3), max_size=15), st.integers(1, 4))
def test_distinct_and_repeated_n_grams_make_up_the_text(tokens, n):
    """Counted one by one: an n-gram is a repetition if it stood there before."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    repeated = sum(gram in grams[:i] for i, gram in enumerate(grams))
    assert repetition(tokens, n=n) == pytest.approx(repeated / len(grams) if grams else 0)
    assert distinct_n(tokens, n=n) + repetition(tokens, n=n) == 1


def test_loops_are_collapse_and_prose_is_not():
    """The stated threshold parts them with room: one token, a phrase again and again, against prose and random tokens."""
    loops = [[7] * 50, list("abcdef") * 9, PROSE[:12] + PROSE[12:15] * 12]
    sound = [PROSE, np.random.default_rng(0).integers(0, 50, 200).tolist()]
    assert all(collapsed(text) for text in loops)
    assert not any(collapsed(text) for text in [*sound, [], [1, 1]])
    assert max(map(repetition, sound)) < 0.1 < COLLAPSED < 0.6 < min(map(repetition, loops))
    with pytest.raises(ArgumentError, match="n must be at least 1"):
        collapsed(PROSE, n=0)


def harness(results, seen):
    """Modules that look like lm-evaluation-harness 0.4 from here."""
    package, models, hf = (types.ModuleType(n) for n in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface"))

    def simple_evaluate(**given):
        seen.update(given)
        return {"results": results}

    package.simple_evaluate, hf.HFLM = simple_evaluate, lambda **given: seen.update(given) or "wrapped"
    return {"lm_eval": package, "lm_eval.models": models, "lm_eval.models.huggingface": hf}


def test_task_accuracy_is_what_the_harness_reports(monkeypatch):
    """Under "metric,filter" keys; the options go through."""
    seen = {}
    results = {"arc": {"alias": "arc", "acc,none": 0.25, "acc_stderr,none": 0.1, "acc_norm,none": 0.5}}
    for name, module in harness(results, seen).items():
        monkeypatch.setitem(sys.modules, name, module)
    assert task_accuracy("model", "tokenizer", ["arc"], limit=7, batch_size=3, num_fewshot=2) == {"arc": 0.25}
    assert task_accuracy("model", "tokenizer", ["arc"], metric="acc_norm") == {"arc": 0.5}
    assert seen["model"] == "wrapped"
    assert (seen["pretrained"], seen["tokenizer"], seen["batch_size"]) == ("model", "tokenizer", 8)
    task_accuracy("model", "tokenizer", ["arc"], limit=7, num_fewshot=2)
    assert (seen["tasks"], seen["limit"], seen["num_fewshot"]) == (["arc"], 7, 2)
    with pytest.raises(ArgumentError, match="'arc' reports no 'f1'; it has acc, acc_norm"):
        task_accuracy("model", "tokenizer", ["arc"], metric="f1")


@pytest.mark.filterwarnings("ignore")
def test_task_accuracy_equals_a_direct_count(tmp_path):
    """With the real harness, on a task of our own that needs no network: the share of questions whose true answer is the likeliest."""
    harness_tasks = pytest.importorskip("lm_eval.tasks", reason="needs lm-eval, which is not among the test packages")
    torch.manual_seed(0)
    tokenizer = tiny.make_tokenizer(form="$A")
    model = tiny.tiny_llama(len(tokenizer)).eval()
    choices = [" a tree", " the sea", " a lamp"]
    questions = [{"question": f["question"], "gold": i % 3} for i, f in enumerate(tiny.facts(24, 5))]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    (tmp_path / "rooms.yaml").write_text(
        "task: rooms\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'q.jsonl'}\n"
        f"doc_to_text: '{{{{question}}}}'\ndoc_to_choice: {choices}\ndoc_to_target: gold\ntarget_delimiter: ''\n"
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    manager = harness_tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = task_accuracy(model, tokenizer, ["rooms"], task_manager=manager, bootstrap_iters=0)

    def summed(question, choice):
        ids, after = tokenizer(question)["input_ids"], tokenizer(choice)["input_ids"]
        logits = model(torch.tensor([ids + after])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        return float(logits.gather(1, torch.tensor(after)[:, None]).sum())

    with torch.no_grad():
        right = [np.argmax([summed(q["question"], c) for c in choices]) == q["gold"] for q in questions]
    assert found == {"rooms": pytest.approx(np.mean(right))}
    assert 0 < np.mean(right) < 1


@pytest.mark.parametrize(
    ("call", "module", "package"),
    [
        (lambda: bleu(["a"], ["a"]), "sacrebleu", r"pip install 'pyunlearn\[metrics\]'"),
        (lambda: chrf(["a"], ["a"]), "sacrebleu", r"pip install 'pyunlearn\[metrics\]'"),
        (lambda: task_accuracy(None, None, ["arc"]), "lm_eval", r"pip install 'lm-eval\[hf\]'"),
    ],
)
def test_a_missing_package_is_one_sentence(monkeypatch, call, module, package):
    """That says how to get it."""
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DependencyError, match=package):
        call()
