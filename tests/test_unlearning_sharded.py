"""Processes that each hold a part of the model (FSDP2) give the run of one process."""

import json
import shutil
import types
from pathlib import Path

import launches
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

import pyunlearn
from pyunlearn.cli import demo
from pyunlearn.cli.demo_model import demo_model
from pyunlearn.errors import ArgumentError, ModelError
from pyunlearn.models.loading import load
from pyunlearn.unlearning.config import UnlearnConfig
from pyunlearn.unlearning.distributed import Processes
from pyunlearn.unlearning.schedule import Schedule
from pyunlearn.unlearning.sharded import ShardedProcesses, processes_of, require_shardable

COMMON = {"learning_rate": 3e-4, "batch_size": 3}
RUNS = {
    "match": {"method": "match", "micro_batch_size": 1},
    "reference": {"method": "npo", "reference_model": "reference", "max_steps": 8},
    "pdu": {"method": "pdu+kl", "max_steps": 16},
    "hidden": {"method": "rmu", "max_steps": 8},
    "adapter": {"method": "ga", "lora": 4, "learning_rate": 3e-3, "gradient_checkpointing": True},
}
ANSWERS = {"tied": {"method": "npo", "retain_loss": "kl"}, "altpo": {"method": "altpo", "max_steps": 8}}


def folder_of(trained, folder, forget):
    """Save a model and its texts in a folder."""
    for part in (trained.model, trained.tokenizer):
        part.save_pretrained(folder / "model")
    reference = trained.fresh()
    with torch.no_grad():
        for number, p in enumerate(reference.parameters()):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number)))
    reference.save_pretrained(folder / "reference")
    for role, rows in {"forget": forget, "corpus": trained.corpus, "holdout": trained.holdout[1:]}.items():
        (folder / f"{role}.json").write_text(json.dumps([r if isinstance(r, dict) else {"text": r} for r in rows]))


def command(out, **options):
    """Return the command of a run on the folder's model."""
    words = [f"--{k.replace('_', '-')}" + ("" if v is True else f" {v}") for k, v in (COMMON | options).items()]
    texts = "--forget forget.json --retain corpus.json --holdout holdout.json"
    return " ".join(["unlearn model", texts, "--quiet", *words, "--out", out])


def launched(trained, folder, runs, with_four):
    """Run each with 2 processes and perhaps one with 4: (folder, forget set). Five texts are an odd share for both."""
    forget = trained.forget + trained.unseen + trained.holdout[:1]
    folder_of(trained, folder, forget)
    for count, names in ((2, runs), *([(4, [with_four])] if with_four else [])):
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
        holdout=trained.holdout[1:],
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


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("name", ANSWERS)
def test_a_tied_head_is_sharded_with_the_embedding(answers, name, one_thread):
    """Also where the head's first weights are cached for retain_loss kl, and where texts are sampled."""
    check_same(tiny.answerer(), *answers, name, ANSWERS[name])


@pytest.mark.slow
@pytest.mark.full
def test_an_encoder_decoder_model_is_sharded(tmp_path, one_thread):
    """The layers of encoder and decoder, and the embedding that both share with the head."""
    folder, forget = launched(tiny.translator(), tmp_path, {"pairs": {"method": "ga", "max_steps": 4}}, None)
    check_same(tiny.translator(), folder, forget, "pairs", {"method": "ga", "max_steps": 4})


STEPS = "--method ga --batch-size 1 --max-steps 8 --learning-rate 3e-4 --checkpoint-every 1e-9"


def stopped_run(out, *more):
    """Return the command of a run of 8 steps that stores each round."""
    return " ".join(["unlearn model --forget forget.json --retain corpus.json --quiet", STEPS, "--out", out, *more])


def check_continued(folder, out):
    """Check that a run which was resumed is the one that was not interrupted."""
    whole, parts = (json.loads((folder / name / "result.json").read_text()) for name in ("whole", out))
    assert [r["step"] for r in parts["history"]] == list(range(1, 9))
    for field in ("forget_loss", "gradient_norm", "retain_nll"):
        assert [r[field] for r in parts["history"]] == pytest.approx([r[field] for r in whole["history"]], rel=1e-4)
    saved, expected = (load_file(folder / name / "model.safetensors") for name in (out, "whole"))
    assert all(torch.allclose(saved[name], p, atol=1e-5) for name, p in expected.items())
    assert not [path.name for path in folder.iterdir() if path.name.startswith(f"{out}.checkpoint")]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """Folder with a run of one process, and the checkpoint of one in four, of which one process was killed."""
    folder, story = tmp_path_factory.mktemp("interrupted"), tiny.storyteller()
    folder_of(story, folder, story.forget)
    printed = launches.launch(folder, 4, stopped_run("new"), script=launches.STOPS, fails=True, SIGNAL="SIGKILL")
    assert "pyunlearn: another process of this launch has ended, so this one ends too" in printed
    run_alone(folder, "whole")
    return folder


def run_alone(folder, out):
    """Return the result of the same run in one process."""
    return pyunlearn.unlearn(
        str(folder / "model"),
        folder / "forget.json",
        retain=folder / "corpus.json",
        output_dir=folder / out,
        progress=False,
        method="ga",
        batch_size=1,
        max_steps=8,
        learning_rate=3e-4,
    )


def copied(folder, out):
    """Copy the checkpoint of the run in four processes for another output folder."""
    shutil.copy(folder / "new.checkpoint.pt", folder / f"{out}.checkpoint.pt")
    shutil.copytree(folder / "new.checkpoint.shards", folder / f"{out}.checkpoint.shards")


@pytest.mark.slow
@pytest.mark.full
def test_a_checkpoint_of_four_processes_resumes_in_two_and_in_one(interrupted, call, monkeypatch):
    """The run continues at the step of the checkpoint, and the numbers are those of one that was not interrupted."""
    assert sorted(p.name for p in (interrupted / "new.checkpoint.shards").glob("*/*")) == [f"{i}.pt" for i in range(4)]
    monkeypatch.chdir(interrupted)
    for out in ("two", "one"):
        copied(interrupted, out)
    launches.launch(interrupted, 2, stopped_run("two", "--resume"))
    check_continued(interrupted, "two")
    code, _, error = call(*stopped_run("one", "--resume").split())
    assert code in (0, 1), error
    check_continued(interrupted, "one")


@pytest.mark.slow
@pytest.mark.full
def test_a_checkpoint_of_one_process_resumes_in_two(interrupted, monkeypatch):
    """From its one file, which is removed at the end."""
    calls, clip = [], Processes.clip_gradients

    def interrupts(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return clip(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Processes, "clip_gradients", interrupts)
        assert run_alone(interrupted, "file").stopped == "interrupted"
    launches.launch(interrupted, 2, stopped_run("file", "--resume"))
    check_continued(interrupted, "file")


@pytest.mark.full
@pytest.mark.parametrize("damage", ["missing", "other bytes"])
def test_a_damaged_part_is_refused(interrupted, call, monkeypatch, damage):
    """In one sentence that names the file."""
    monkeypatch.chdir(interrupted)
    out = damage.split()[0]
    copied(interrupted, out)
    part = next((interrupted / f"{out}.checkpoint.shards").glob("*/2.pt"))
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.unlink()
    if damage == "other bytes":
        part.write_bytes(data)
    code, _, error = call(*stopped_run(out, "--resume").split())
    assert code == 2
    assert {"missing": "a part of the checkpoint", "other bytes": "is damaged"}[damage] in error


@pytest.mark.slow
@pytest.mark.full
def test_weights_that_the_configuration_does_not_describe_are_refused(tmp_path):
    """By all processes in one sentence: they would wait for each other's tensors, or mix them."""
    trained = tiny.storyteller()  # its head is a matrix of its own
    folder_of(trained, tmp_path, trained.forget)
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    error = launches.launch(tmp_path, 2, command("out"), fails=True, timeout=120)
    assert "the saved weights are not those that the model's configuration describes" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.full
def test_a_signal_to_one_process_stores_the_parts_of_all(interrupted):
    """SIGTERM ends the launch after a step; two processes resume."""
    launches.launch(interrupted, 2, stopped_run("term"), script=launches.STOPS, fails=True, SIGNAL="SIGTERM")
    assert (interrupted / "term.checkpoint.pt").exists()
    launches.launch(interrupted, 2, stopped_run("term", "--resume"))
    check_continued(interrupted, "term")


@pytest.mark.slow
@pytest.mark.full
def test_each_process_holds_its_part_alone(interrupted):
    """Of weights, last accepted weights and moments: half each with two processes, of which one reads the model."""
    launches.launch(interrupted, 2, stopped_run("half", "--max-steps 2"), script=launches.COUNTS)
    total = sum(p.numel() for p in tiny.storyteller().model.parameters())
    for rank in range(2):
        counts = json.loads((interrupted / f"counts{rank}.json").read_text())
        assert counts["numbers"] == pytest.approx([total / 2] * 3, rel=0.01)
        assert counts["empty"]
        assert set(counts["empty"]) == {rank == 1}


@pytest.mark.slow
@pytest.mark.full
def test_accelerate_shards_with_the_config_among_the_examples(interrupted):
    """Its launcher exports what the other tests do."""
    config = Path(__file__).parent.parent / "examples" / "fsdp2.yaml"
    launches.launch(interrupted, 2, stopped_run("yaml", "--max-steps 1"), script=launches.COUNTS, config=config)
    numbers = [json.loads((interrupted / f"counts{rank}.json").read_text())["numbers"] for rank in range(2)]
    assert sum(weights for weights, *_ in numbers) == sum(p.numel() for p in tiny.storyteller().model.parameters())
    assert (interrupted / "yaml" / "result.json").exists()


@pytest.mark.slow
@pytest.mark.full
def test_sharded_float32_weights_compute_in_bfloat16_as_on_a_gpu(interrupted):
    """The first loss differs by the rounding of 16 bits, and the weights stay float32."""
    launches.launch(interrupted, 2, stopped_run("short", "--max-steps 1"), script=launches.BFLOAT16)
    short, whole = (json.loads((interrupted / name / "result.json").read_text()) for name in ("short", "whole"))
    difference = abs(short["history"][0]["forget_loss"] - whole["history"][0]["forget_loss"])
    assert 1e-5 < difference < 1e-2
    assert {p.dtype for p in load_file(interrupted / "short" / "model.safetensors").values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.timeout(900)
def test_two_processes_unlearn_a_text_of_smollm2_as_one_does(tmp_path):
    """With the verdicts, steps and log-likelihoods of one process, after six steps."""
    sets = {
        "forget": list(demo.FORGET.values())[:1],
        "corpus": list(demo.SURVIVE.values())[:4],
        "holdout": demo.HOLDOUT.read_text(encoding="utf-8").splitlines(),
    }
    for role, texts in sets.items():
        (tmp_path / f"{role}.json").write_text(json.dumps([{"text": text} for text in texts]))
    words = f"unlearn {demo_model()} --forget forget.json --retain corpus.json --holdout holdout.json --quiet --out two"
    words += " --max-steps 6"
    launches.launch(tmp_path, 2, words, timeout=800)
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    alone = pyunlearn.unlearn(
        str(demo_model()),
        sets["forget"],
        retain=sets["corpus"],
        holdout=sets["holdout"],
        max_steps=6,
        progress=False,
    )
    assert result["stopped"] == alone.stopped
    assert alone.examples[0].log_likelihood_after < alone.examples[0].log_likelihood_before - 0.1
    for mine, theirs in zip(result["examples"], alone.examples, strict=True):
        assert (mine["verdict"], mine["steps"]) == (theirs.verdict, theirs.steps)
        assert mine["log_likelihood_after"] == pytest.approx(theirs.log_likelihood_after, abs=1e-2)


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
    layers = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).half()])
    with pytest.raises(ModelError, match="the trained weights are float16 and float32"):
        require_shardable(UnlearnConfig(), layers)
    require_shardable(UnlearnConfig(lora=4), layers)
