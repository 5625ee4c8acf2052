"""Processes that each hold a part of the model (FSDP2) give the run of one process."""

import json
import types

import launches
import numpy as np
import pytest
import tiny
import torch

import pyunlearn
from pyunlearn.errors import ArgumentError, ModelError
from pyunlearn.models.loading import load
from pyunlearn.unlearning.config import UnlearnConfig
from pyunlearn.unlearning.schedule import Schedule
from pyunlearn.unlearning.sharded import ShardedProcesses, processes_of, require_shardable

COMMON = {"learning_rate": 3e-4, "batch_size": 3}
RUNS = {
    "match": {"method": "match", "micro_batch_size": 1},
    "pdu": {"method": "pdu+kl", "max_steps": 16},
    "hidden": {"method": "rmu", "max_steps": 8},
    "adapter": {"method": "ga", "lora": 4, "learning_rate": 3e-3, "gradient_checkpointing": True},
}
ANSWERS = {"tied": {"method": "npo", "retain_loss": "kl"}, "altpo": {"method": "altpo", "max_steps": 8}}


def folder_of(trained, folder, forget):
    """Save a model and its texts in a folder."""
    for part in (trained.model, trained.tokenizer):
        part.save_pretrained(folder / "model")
    for role, rows in {"forget": forget, "corpus": trained.corpus}.items():
        (folder / f"{role}.json").write_text(json.dumps([r if isinstance(r, dict) else {"text": r} for r in rows]))


def command(out, **options):
    """Return the command of a run on the folder's model."""
    words = [f"--{k.replace('_', '-')}" + ("" if v is True else f" {v}") for k, v in (COMMON | options).items()]
    return " ".join(["unlearn model --forget forget.json --retain corpus.json --quiet", *words, "--out", out])


def launched(trained, folder, runs, with_four):
    """Run each with 2 processes and one with 4: (folder, forget set). Five texts are an odd share for both."""
    forget = trained.forget + trained.unseen + trained.holdout[:1]
    folder_of(trained, folder, forget)
    for count, names in ((2, runs), (4, [with_four])):
        launches.launch(folder, count, *(command(f"{name}{count}", **runs[name]) for name in names))
    return folder, forget


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """Runs on a Llama whose head is a matrix of its own: (folder, forget set)."""
    return launched(tiny.storyteller(), tmp_path_factory.mktemp("stories"), RUNS, "match")


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Runs on a GPT-2 whose head is tied to the embedding: (folder, forget set)."""
    return launched(tiny.answerer(), tmp_path_factory.mktemp("answers"), ANSWERS, "tied")


def check_same(trained, folder, forget, name, options):
    """Check that the runs of several processes are that of one, to rounding."""
    alone = pyunlearn.unlearn(
        trained.fresh(),
        forget,
        retain=trained.corpus,
        tokenizer=trained.tokenizer,
        progress=False,
        **COMMON | options,
    )
    weights = alone.model.state_dict()
    outs = [out for count in (2, 4) if (out := folder / f"{name}{count}").exists()]
    assert outs
    for out in outs:
        result = json.loads((out / "result.json").read_text())
        assert result["stopped"] == alone.stopped
        assert [r["examples"] for r in result["history"]] == [r["examples"] for r in alone.history]
        for field in ("forget_loss", "gradient_norm", "retain_nll", "retain_kl", "multiplier", "utility_rise"):
            ours, theirs = ([r.get(field) for r in history] for history in (alone.history, result["history"]))
            assert [x is None for x in ours] == [x is None for x in theirs]
            expected = [x for x in ours if x is not None]
            assert [x for x in theirs if x is not None] == pytest.approx(expected, rel=1e-3, abs=1e-5), field
        for mine, theirs in zip(result["examples"], alone.examples, strict=True):
            assert mine["log_likelihood_after"] == pytest.approx(theirs.log_likelihood_after, abs=1e-3)
            assert (mine["verdict"], mine["steps"]) == (theirs.verdict, theirs.steps)
        saved, _ = load(out)
        assert type(saved) is type(alone.model)
        config = json.loads((out / "config.json").read_text()) if (out / "config.json").exists() else {}
        assert config.get("architectures", [type(trained.model).__name__]) == [type(trained.model).__name__]
        for key, p in saved.state_dict().items():
            assert torch.allclose(p, weights[key], atol=1e-4), key


@pytest.mark.full
@pytest.mark.parametrize("name", RUNS)
def test_sharded_processes_give_the_run_of_one(stories, name, one_thread, monkeypatch):
    """Losses, gradient norms, verdicts and saved weights."""
    monkeypatch.chdir(stories[0])  # an adapter names the folder of its model
    check_same(tiny.storyteller(), *stories, name, RUNS[name])


@pytest.mark.full
@pytest.mark.parametrize("name", ANSWERS)
def test_a_tied_head_is_sharded_with_the_embedding(answers, name, one_thread):
    """Also where the head's first weights are cached for retain_loss kl, and where texts are sampled."""
    check_same(tiny.answerer(), *answers, name, ANSWERS[name])


def processes(rank, count, **others):
    """Return one of several sharded processes."""
    accelerator = {"distributed_type": "MULTI_CPU", "process_index": rank, "num_processes": count, "device": "cpu"}
    return ShardedProcesses(types.SimpleNamespace(**accelerator | others))


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("items", [0, 1, 3, 4, 7])
def test_shares_are_of_one_size_and_count_every_item_once(items, count):
    """Batches and micro-batches, in any number of processes: what fills a share up does not count."""
    batches = [[([i], f"batch {i}") for i in range(items)]] * count
    shares = [list(processes(rank, count).batches(iter(batches[rank]))) for rank in range(count)]
    assert {len(share) for share in shares} == {-(-items // count)}
    assert sorted(i for share in shares for indices, _ in share for i in indices) == list(range(items))
    schedule = Schedule(batch_size=8, micro_batch_size=2, retain_examples=0, seed=0)
    shares = [processes(rank, count).micro_batches(schedule, np.arange(items)) for rank in range(count)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(i for share in shares for each, factor in share if factor == 1 for i in each) == list(range(items))
    assert all(each and factor in (0, 1) for share in shares for each, factor in share)


def test_what_fsdp_cannot_do_is_refused(monkeypatch):
    """Version 1 and offloading by the launch, merges, masks and 4-bit weights by the run: one sentence each."""
    accelerator = types.SimpleNamespace(distributed_type="FSDP", process_index=0, num_processes=2)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ArgumentError, match=r"FSDP version 1, .* set fsdp_version: 2"):
        processes_of(accelerator)
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert processes_of(accelerator).sharded
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    with pytest.raises(ArgumentError, match=r"fsdp_offload_params, .* set it to false"):
        processes_of(accelerator)
    model = torch.nn.Linear(2, 2)
    require_shardable(UnlearnConfig(), model)
    for settings in ({"merge": True}, {"mask": "saliency"}):
        with pytest.raises(ArgumentError, match=f"{next(iter(settings))} needs the whole model"):
            require_shardable(UnlearnConfig(**settings), model)
    model.weight = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ModelError, match="quantized weights cannot be sharded"):
        require_shardable(UnlearnConfig(), model)
