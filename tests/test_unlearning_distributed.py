"""Several processes give the run of one, printed and saved once."""

import json
import os
import signal
import socket
import subprocess
import sys
import types

import launches
import pytest
import tiny
import torch
from accelerate.state import AcceleratorState, PartialState
from coverings import slow
from test_attacks_paraphrases import with_paraphrases

import pyunlearn
from pyunlearn.errors import ArgumentError
from pyunlearn.unlearning.distributed import Processes, make_accelerator
from pyunlearn.unlearning.interrupt import DeferredInterrupt
from pyunlearn.unlearning.sharded import processes_of

METHODS = {"ga": {"mask": "saliency"}, "pdu+kl": {"utility_budget": 0.1}, "match": {"scope": "person"}}
STOPPED = {"ga": "no likelier", "pdu+kl": "still extracted", "match": "forgotten"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model and its texts in a folder: (story, folder)."""
    story, folder = tiny.storyteller(), tmp_path_factory.mktemp("launch")
    for part in (story.model, story.tokenizer):
        part.save_pretrained(folder / "model")
    for role in ("forget", "corpus"):
        (folder / f"{role}.json").write_text(json.dumps([{"text": text} for text in getattr(story, role)]))
    for role, texts in in_other_words(story).items():
        (folder / f"{role}-person.json").write_text(json.dumps(texts))
    return story, folder


def in_other_words(story):
    """The forget set, with the unseen texts, and the holdout: records with paraphrases, for scope="person"."""
    forget = with_paraphrases(story.forget, 2) + with_paraphrases(story.unseen)
    return {"forget": forget, "holdout": with_paraphrases(story.holdout)}


@pytest.fixture(scope="module")
def launched(saved):
    """Run `pyunlearn unlearn` with each method in two processes, in one launch: (story, folder, output)."""
    story, folder = saved
    (folder / "both.py").write_text(launches.SERIES)
    common = "unlearn model --retain corpus.json --learning-rate 3e-4 --batch-size 3 --json --quiet"
    files = "--forget forget-person.json --holdout holdout-person.json"
    each = [
        f"{common} --method {method} --out {method} {files if 'scope' in options else '--forget forget.json'} "
        + " ".join(f"--{k.replace('_', '-')} {v}" for k, v in options.items())
        for method, options in METHODS.items()
    ]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "both.py"]
    done = subprocess.run(
        [*launch, *" , ".join(each).split()],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # without a GPU, torchrun's processes are joined on the CPUs
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return story, folder, done.stdout


def documents(text):
    """Return the JSON documents of a text, one after the other."""
    parsed = []
    while text := text.lstrip():
        document, end = json.JSONDecoder().raw_decode(text)
        parsed.append(document)
        text = text[end:]
    return parsed


@pytest.mark.full
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_give_the_run_of_one(launched, method, one_thread):
    """Examples, steps and log-likelihoods are those of one process; only the main process prints and saves."""
    story, folder, output = launched
    texts = in_other_words(story) if "scope" in METHODS[method] else {"forget": story.forget}
    alone = pyunlearn.unlearn(
        story.fresh(),
        **texts,
        retain=story.corpus,
        tokenizer=story.tokenizer,
        learning_rate=3e-4,
        batch_size=3,
        progress=False,
        method=method,
        **METHODS[method],
    )
    assert len(documents(output)) == len(METHODS)  # one process prints
    printed = documents(output)[list(METHODS).index(method)]
    assert printed["stopped"] == alone.stopped == STOPPED[method]
    assert printed["non_member_scores"] == pytest.approx(alone.non_member_scores, abs=1e-4)
    assert [r["examples"] for r in printed["history"]] == [r["examples"] for r in alone.history]
    for name in (
        "forget_loss",
        "retain_kl" if "+kl" in method else "retain_nll",
        "gradient_norm",
        *(["multiplier"] if "pdu" in method else []),
    ):
        assert [r[name] for r in printed["history"]] == pytest.approx(
            [r[name] for r in alone.history], rel=1e-3, abs=1e-5
        )
    for mine, theirs in zip(printed["examples"], alone.examples, strict=True):
        assert mine["log_likelihood_after"] == pytest.approx(theirs.log_likelihood_after, abs=2e-3)
        assert (mine["verdict"], mine["steps"], mine["form"]) == (theirs.verdict, theirs.steps, theirs.form)
    saved = type(story.model).from_pretrained(folder / method)
    for name, p in saved.state_dict().items():
        assert torch.allclose(p, alone.model.state_dict()[name], atol=1e-4), name


def test_deepspeed_is_refused():
    """One sentence names the launch and says what to do instead."""
    with pytest.raises(ArgumentError, match=r"this launch is DEEPSPEED: .*fsdp2.yaml, or train an adapter"):
        processes_of(types.SimpleNamespace(distributed_type="DEEPSPEED", process_index=0, num_processes=2))


def test_shards_cover_every_item_once():
    """With any number of processes, also more than there are items."""
    for count in (1, 2, 5):
        every = [
            Processes(types.SimpleNamespace(distributed_type="MULTI_CPU", process_index=i, num_processes=count))
            for i in range(count)
        ]
        assert sorted(x for w in every for x in w.shard(range(3))) == [0, 1, 2]
        assert [w.is_main for w in every] == [True] + [False] * (count - 1)


DIES = """
import os, signal, sys
from pyunlearn.cli import main as cli
from pyunlearn.unlearning.distributed import Processes, make_accelerator
calls, sum_gradients = [], Processes.sum_gradients

def dies(self, parameters):
    calls.append(1)
    if len(calls) == 4 and os.environ["RANK"] == os.environ["DIES"]:
        os.kill(os.getpid(), signal.SIGKILL)
    sum_gradients(self, parameters)

Processes.sum_gradients = dies
cli.main()
"""


@pytest.mark.full
@pytest.mark.parametrize("dies", ["0", *slow("1")])
def test_a_dead_process_ends_the_others_with_a_checkpoint(saved, call, dies):
    """Within seconds, with one sentence, whichever it is; one process resumes from the checkpoint."""
    _, folder = saved
    (folder / "dies.py").write_text(DIES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = f"unlearn {folder}/model --forget {folder}/forget.json --retain {folder}/corpus.json --learning-rate 3e-4 "
    words += f"--batch-size 1 --max-steps 8 --method ga --quiet --out {folder}/out{dies}"
    common = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "DIES": dies}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = [
        subprocess.Popen(
            [sys.executable, folder / "dies.py", *words.split()],
            env=common | {"RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    errors = [process.communicate(timeout=120)[1] for process in running]
    other = 1 - int(dies)
    assert running[int(dies)].returncode == -signal.SIGKILL
    assert running[other].returncode == 2, errors[other]
    assert "pyunlearn: another process of this launch has ended, so this one ends too" in errors[other]
    assert "Traceback" not in errors[other]
    assert (folder / f"out{dies}.checkpoint.pt").exists()
    code, _, err = call(*words.split(), "--resume")
    assert code in (0, 1), err
    history = json.loads((folder / f"out{dies}" / "result.json").read_text())["history"]
    assert [record["step"] for record in history] == list(range(1, 9))


def accelerator(processes=1):
    """Return what unlearn reads of an Accelerator."""
    return types.SimpleNamespace(distributed_type="NO", process_index=0, num_processes=processes)


def test_processes_that_are_not_joined_are_refused(monkeypatch):
    """Each would do the whole run and write to the same folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ArgumentError, match="started 2 processes, and accelerate joins 1"):
        Processes(accelerator())
    assert Processes(accelerator(2)).count == 2


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, r"FSDP version 1, .* set fsdp_version: 2"),
        ({}, r"^accelerate cannot join the processes of this launch \(.*MASTER_ADDR.*\): launch with"),
    ],
)
def test_a_launch_that_accelerate_cannot_join_is_refused(monkeypatch, variables, message):
    """In one sentence, where accelerate raises an error of its own."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", **variables}.items():
        monkeypatch.setenv(name, value)
    for state in (PartialState, AcceleratorState):
        monkeypatch.setattr(state, "_shared_state", {})
    with pytest.raises(ArgumentError, match=message):
        make_accelerator(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("wanted", ["bf16", "no", "fp16"])
def test_float32_weights_compute_in_bfloat16_on_a_cpu_where_accelerate_is_told_so(monkeypatch, own_accelerate, wanted):
    """ACCELERATE_MIXED_PRECISION=bf16 does it; other values do nothing here, and 16-bit weights are no matter of it."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", wanted)
    model, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    narrow = make_accelerator(torch.nn.Linear(2, 2).bfloat16())
    assert narrow.mixed_precision == "no"
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", wanted)
    with make_accelerator(model).autocast():
        assert model(x).dtype == (torch.bfloat16 if wanted == "bf16" else torch.float32)


def test_a_signal_to_one_process_ends_all():
    """At the same step, for the others would wait for it in the next sum."""
    interrupt = DeferredInterrupt()
    interrupt.check()
    with pytest.raises(KeyboardInterrupt):
        interrupt.check(lambda here: not here)  # another process has it


def test_a_signal_to_end_one_process_ends_all():
    """Each gets one of its own, where the first would leave the others waiting; after Ctrl-C none does."""
    arrived = []
    before = signal.signal(signal.SIGTERM, lambda number, _: arrived.append(number))
    try:
        interrupt = DeferredInterrupt()
        interrupt.redeliver()
        assert arrived == []
        interrupt.redeliver(lambda here: not here)  # another process has it
        interrupt.received = signal.SIGINT
        interrupt.redeliver()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert arrived == [signal.SIGTERM]
