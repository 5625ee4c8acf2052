"""A model whose layers are on two devices, and one on a device without kernels of ours, against the same on the CPU.

The devices are those of tests/second_device: memory of the CPU, and operators that refuse tensors on both.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

HERE = Path(__file__).parent / "second_device"
sys.path.insert(0, str(HERE))

import runs  # noqa: E402
import two_devices  # noqa: E402

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("one_thread")]

SPREAD = [name for name in runs.CASES if name != "one device"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, one_thread):
    """A Llama, a GPT-2 and a T5 that have memorized two texts, with their tokenizers."""
    folder = tmp_path_factory.mktemp("models")
    for kind, make in {"llama": tiny.tiny_llama, "gpt2": tiny.tiny_gpt2, "t5": tiny.tiny_t5}.items():
        tokenizer = tiny.make_tokenizer(form="$A </s>" if kind == "t5" else "<s> $A")
        torch.manual_seed(0)
        model = make(len(tokenizer))
        tiny.train(model, tokenizer, runs.ROWS[kind](60, 2) + runs.ROWS[kind](2, 3) * 30, epochs=6)
        model.save_pretrained(folder / kind)
        tokenizer.save_pretrained(folder / kind)
    return folder


@pytest.fixture(scope="module")
def outcome(folder, tmp_path_factory):
    """What tests/second_device/runs.py prints, in a process of its own."""
    if sys.platform != "linux":
        pytest.skip("the library is linked as on Linux")
    try:
        library = two_devices.build(tmp_path_factory.mktemp("library"))
    except FileNotFoundError:
        pytest.skip("no c++ here")
    except subprocess.CalledProcessError as error:
        pytest.fail(error.stderr.decode()[-3000:])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    environment["TORCHDYNAMO_DISABLE"] = "1"  # bitsandbytes would compile its 4-bit format for seconds
    child = subprocess.run(
        [sys.executable, HERE / "runs.py", library, folder], env=environment, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr[-3000:]
    return json.loads(child.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def on_cpu(folder):
    """Kind of a model -> the same numbers on the CPU."""

    def of(kind):
        names = {name for of, _, names in runs.CASES.values() for name in names if of == kind}
        tokenizer = runs.load_tokenizer(folder / kind)
        return runs.numbers(*[lambda: runs.load(folder, kind)] * 2, tokenizer, kind, names)

    return {kind: of(kind) for kind in runs.ROWS}


def agree(a, b):
    """Check that numbers, texts and lists of them agree to rounding."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        a, b = list(a.values()), list(b.values())
    if isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            agree(x, y)
    else:
        assert a == (pytest.approx(b, rel=2e-4, abs=2e-5) if isinstance(b, float) else b)


@pytest.mark.parametrize("case", runs.CASES)
def test_the_numbers_are_those_of_one_device(outcome, on_cpu, case):
    """Of unlearning, audit, edit, attack and comparison, to rounding."""
    kind, _, names = runs.CASES[case]
    own = outcome["numbers"][case]
    assert own.keys() == {*names, "places"}
    for name in names:
        agree(own[name], on_cpu[kind][name])


@pytest.mark.parametrize("case", SPREAD)
def test_the_model_stays_where_it_is(outcome, case):
    """All of them that were loaded, also the reference model."""
    assert all(places == [runs.A, runs.B] for places in outcome["numbers"][case]["places"])


def test_a_run_is_resumed(outcome):
    """To the numbers of an uninterrupted one."""
    assert len(outcome["resumed"]["whole"]) == 4
    agree(outcome["resumed"]["resumed"], outcome["resumed"]["whole"])


def test_what_cannot_be_done_is_refused_in_one_sentence(outcome):
    """It says how to mend it."""
    apart, processes = (outcome["refused"][name] for name in ("shared weights apart", "several processes"))
    assert apart.startswith("ModelError: the device_map of model puts transformer.wte on second:0, and its weights are")
    assert apart.endswith("on second:1: put modules that share weights (embedding and head) on one device, and move "
                          "none later")  # fmt: skip
    assert processes.startswith("ModelError: the layers of model are on several devices (device_map), and this launch")
    assert processes.endswith("start one process, or load it without device_map")


def test_commands_run_on_a_device_without_kernels_of_ours(outcome, on_cpu):
    """`--device` of unlearn, audit and edit."""
    own = outcome["commands"]
    agree(own["unlearn"], on_cpu["llama"]["unlearn"]["log-likelihoods"])
    agree(own["audit"], on_cpu["llama"]["audit"]["exposures"])
    assert own["edit"] == ["forget", "retain"]
