"""MUSE: VerbMem, KnowMem and PrivLeak are those of a plain loop; files, and wrong inputs."""

import json
import re

import numpy as np
import pytest
import tiny
import torch
from rouge_score.rouge_scorer import RougeScorer
from tofu_folder import write

import pyunlearn
from pyunlearn.benchmarking import muse
from pyunlearn.benchmarking.config import BenchConfig
from pyunlearn.errors import DataError


@pytest.fixture
def data(story, tmp_path):
    """A folder like MUSE's; solved questions for one of the two sets of questions."""
    folder = tmp_path / "MUSE"
    for name in ("verbmem", "knowmem", "privleak"):
        (folder / name).mkdir(parents=True)
    passages = [text.split(" and ", 1) for text in (*story.forget, *story.holdout[:5])]
    write(folder / "verbmem" / "forget.jsonl", [{"prompt": a, "gt": f" and {b}"} for a, b in passages])
    (folder / "privleak" / "forget.json").write_text(json.dumps([*story.forget, *story.holdout[5:12]]))
    write(folder / "privleak" / "holdout.jsonl", [{"text": text} for text in story.holdout[12:20]])
    for seed, name in enumerate(("forget_qa", "retain_qa", "forget_qa_icl")):
        rows = [{"question": "who?", "answer": text[:12]} for text in tiny.sentences(7, seed + 5)]
        write(folder / "knowmem" / f"{name}.jsonl", rows if name != "forget_qa_icl" else rows[:1])
    return folder


@pytest.fixture(scope="module")
def other(story):
    """A model that was not trained on the texts: the same with noise on its weights."""
    model = story.fresh()
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model


def bench(story, data, model=None, **settings):
    """Return the result for the storyteller, or for another model with its tokenizer."""
    model = story.model if model is None else model
    return pyunlearn.bench("muse", model, data, tokenizer=story.tokenizer, progress=False, **settings)


def greedy(story, prompt, longest):
    """Return what a plain loop over the logits writes, within the context of 96 tokens."""
    ids = story.tokenizer(prompt)["input_ids"]
    start = len(ids)
    while len(ids) < min(96, start + longest) and ids[-1] != story.tokenizer.eos_token_id:
        with torch.no_grad():
            ids.append(int(story.model(torch.tensor([ids])).logits[0, -1].argmax()))
    return story.tokenizer.decode(ids[start:], skip_special_tokens=True)


def rouge(written, truths):
    """Return the mean ROUGE-L F1."""
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    return np.mean([scorer.score(t, w)["rougeL"].fmeasure for w, t in zip(written, truths, strict=True)])


def area(model, story, forget, holdout):
    """Return MUSE's area: the share of pairs whose forget text has the larger minus mean of its 40 % lowest tokens."""

    def score(text):
        ids = story.tokenizer(text)["input_ids"]
        with torch.no_grad():
            rows = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        values = np.sort(rows.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy())
        return -values[: int(len(values) * 0.4)].mean()

    pairs = [(score(f), score(h)) for f in forget for h in holdout]
    return np.mean([(f > h) + 0.5 * (f == h) for f, h in pairs])


def lines_of(path, key):
    """Return a column of a .jsonl file."""
    return [json.loads(line)[key] for line in path.read_text().splitlines()]


def test_a_retrained_model_that_tells_the_sets_apart_leaves_no_privleak():
    """No area is above 1: the other columns and a note are there."""
    names = [*muse._COLUMNS, *muse.COMPARED]
    numbers = {name: {"rouge": np.array([0.1, 0.2]), "min_k": np.array([1.0, 2.0])} for name in names}
    retrained = numbers | {"privleak holdout": {"min_k": np.array([3.0, 4.0])}}
    assert [column.measure for column in muse.columns(numbers, retrained, BenchConfig())] == [
        "VerbMem", "KnowMem", "KnowMem",
    ]  # fmt: skip
    (note,) = muse.notes(numbers, retrained)
    assert note.startswith("PrivLeak is left out")


@pytest.mark.full
def test_the_columns_are_those_of_a_plain_loop(story, other, data):
    """Passages, answers with a solved question before them and without, and the areas under both models."""
    result = bench(story, data, retrained=other)
    file = data / "verbmem" / "forget.jsonl"
    verbatim = rouge([greedy(story, p, 128) for p in lines_of(file, "prompt")], lines_of(file, "gt"))
    answers = {}
    (shot,) = lines_of(data / "knowmem" / "forget_qa_icl.jsonl", "answer")
    for name, head in (("forget", f"Question: who?\nAnswer: {shot}\n\n"), ("retain", "")):
        text = greedy(story, f"{head}Question: who?\nAnswer: ", 32)
        text = re.split("\n\n|\nQuestion|Question:", text)[0]
        truths = lines_of(data / "knowmem" / f"{name}_qa.jsonl", "answer")
        answers[name] = rouge([text] * len(truths), truths)
    forget, holdout = json.loads((data / "privleak" / "forget.json").read_text()), story.holdout[12:20]
    now, retrained = (area(model, story, forget, holdout) for model in (story.model, other))
    wanted = {
        "forget_verbmem": verbatim,
        "forget_knowmem": answers["forget"],
        "retain_knowmem": answers["retain"],
        "privleak": 100 * (now - retrained) / retrained,
    }
    assert {name: c.estimate for name, c in result.columns.items()} == pytest.approx(wanted, abs=1e-4)
    assert [c.questions for c in result.columns.values()] == [7, 7, 7, 17]
    assert all(c.low <= c.estimate <= c.high for c in result.columns.values())
    (note,) = result.notes  # 128 tokens after a prompt are more than the context has
    assert note.startswith("7 of 7 verbmem forget passages filled the model's context of 96 tokens before the 128")
    chance = bench(story, data)
    assert chance["privleak"].estimate == pytest.approx(100 * (now - 0.5) / 0.5)
    assert chance.notes[1].startswith("PrivLeak is against chance")


@pytest.mark.full
def test_the_command(call, story, other, data):
    """The retrained model as a result and as a model; its own result against itself is named."""
    for name, model in (("model", story.fresh()), ("retrained", other)):
        for part in (model, story.tokenizer):
            part.save_pretrained(data.parent / name)
    options = ("--data", data, "--first", 6, "--quiet")
    assert call("bench", "muse", data.parent / "retrained", *options, "--out", "own")[0] == 0
    outs = []
    for retrained in ("own/bench.json", data.parent / "retrained"):
        code, out, err = call("bench", "muse", data.parent / "model", *options, "--retrained", retrained)
        assert (code, err) == (0, "")
        outs.append(out)
    assert outs[0] == outs[1]
    lines = outs[0].splitlines()
    assert lines[0] == "muse: model, read with the prompts of MUSE"
    assert lines[2].split() == ["questions", "VerbMem", "KnowMem"]
    assert lines[4].startswith(" forget, 6")
    (leak,) = [line for line in lines if line.startswith("PrivLeak")]
    assert re.match(r"PrivLeak -?\d+\.\d \[-?\d+\.\d, (-?\d+\.\d|inf)\] %$", leak)
    out = call("bench", "muse", data.parent / "retrained", *options, "--retrained", "own/bench.json")[1]
    assert "then PrivLeak is 0 by definition" in " ".join(out.split())


@pytest.mark.parametrize(
    ("file", "row", "message"),
    [
        ("verbmem/forget.jsonl", {"prompt": "a"}, 'line 1, has no "gt"'),
        ("knowmem/forget_qa.jsonl", {"question": "a", "answer": "?"}, 'has a "answer" without Latin letter or digit'),
        ("privleak/holdout.jsonl", {"texts": "a"}, 'line 1, has no "text"'),
        ("privleak/holdout.jsonl", {"text": " "}, 'line 1, has an empty "text"'),
        (
            "privleak/holdout.jsonl",
            {"text": "the cat sees a tree. " * 40},
            r"privleak holdout text 1 has \d+ tokens with what stands before it, and the model\'s context has 96",
        ),
        (
            "verbmem/forget.jsonl",
            {"prompt": "the cat " * 90, "gt": "a"},
            r"verbmem forget passage 1 has \d+ tokens with",
        ),
    ],
)
def test_a_wrong_row_is_one_sentence(story, data, file, row, message):
    """Missing columns, and texts that are longer than the context."""
    write(data / file, [row])
    with pytest.raises(DataError, match=message):
        bench(story, data, first=1)


def test_a_missing_file_is_named(story, data):
    """With all files that are wanted."""
    (data / "knowmem" / "retain_qa.jsonl").unlink()
    message = "has no knowmem/retain_qa .*: wanted are the files verbmem/forget, knowmem/forget_qa, knowmem/retain_qa, "
    with pytest.raises(DataError, match=message):
        bench(story, data)
