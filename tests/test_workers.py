"""Several processes: the same run as alone, said and saved once."""

import json
import os
import subprocess
import sys
import types

import pytest
import tiny
import torch

import pyunlearn
from pyunlearn._workers import Workers
from pyunlearn.errors import ArgumentError


@pytest.mark.parametrize("method", ["ga", "pdu+kl"])
def test_two_processes_give_the_run_of_one(tmp_path, method):
    """Examples, steps and log-likelihoods are those of one process; one of the two prints and saves."""
    story = tiny.storyteller()
    for part in (story.model, story.tokenizer):
        part.save_pretrained(tmp_path / "model")
    for role in ("forget", "retain"):
        (tmp_path / f"{role}.json").write_text(json.dumps([{"text": text} for text in getattr(story, role)]))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = pyunlearn.unlearn(
        story.fresh(), story.forget, retain=story.retain, tokenizer=story.tokenizer, learning_rate=3e-4, batch_size=3, progress=False,
        method=method, mask="saliency" if method == "ga" else None,
    )  # fmt: skip
    torch.set_num_threads(threads)
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "pyunlearn.cli",
    ]
    command = [
        "unlearn",
        str(tmp_path / "model"),
        "--forget",
        str(tmp_path / "forget.json"),
        "--retain",
        str(tmp_path / "retain.json"),
    ]
    options = [
        "--method",
        method,
        "--learning-rate",
        "3e-4",
        "--batch-size",
        "3",
        "--json",
        "--quiet",
        "--out",
        str(tmp_path / "out"),
        *(["--mask", "saliency"] if method == "ga" else []),
    ]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *command, *options], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)  # printed once
    assert found["stopped"] == alone.stopped == "forgotten"
    assert found["reference_scores"] == pytest.approx(alone.reference_scores, abs=1e-4)
    assert [r["examples"] for r in found["history"]] == [r["examples"] for r in alone.history]
    for name in (
        "forget_loss",
        "retain_kl" if "+kl" in method else "retain_nll",
        "gradient_norm",
        *(["multiplier"] if "pdu" in method else []),
    ):
        assert [r[name] for r in found["history"]] == pytest.approx(
            [r[name] for r in alone.history], rel=1e-3, abs=1e-5
        )
    for mine, theirs in zip(found["examples"], alone.examples, strict=True):
        assert mine["log_likelihood_after"] == pytest.approx(theirs.log_likelihood_after, abs=2e-3)
        assert (mine["verdict"], mine["steps"]) == (theirs.verdict, theirs.steps)
    saved = type(story.model).from_pretrained(tmp_path / "out")
    for name, p in saved.state_dict().items():
        assert torch.allclose(p, alone.model.state_dict()[name], atol=1e-4), name


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_a_model_in_pieces_is_refused(kind):
    """One sentence that names the launch and the mend."""
    with pytest.raises(ArgumentError, match=f"hold the whole model .* this launch is {kind}: .* adapter"):
        Workers(types.SimpleNamespace(distributed_type=kind, process_index=0, num_processes=2))


def test_shares_cover_everything_once():
    """Whatever the number of processes, and also when there are fewer items than processes."""
    for count in (1, 2, 5):
        every = [
            Workers(types.SimpleNamespace(distributed_type="MULTI_CPU", process_index=i, num_processes=count))
            for i in range(count)
        ]
        assert sorted(x for w in every for x in w.share(range(3))) == [0, 1, 2]
        assert [w.leads for w in every] == [True] + [False] * (count - 1)
