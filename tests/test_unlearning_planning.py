"""Plan of a run: bytes by part as a run has them, what fits, the options that make it fit, and the time."""

import json
import os
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as tf
from architectures import KV
from coverings import slow

import pyunlearn
from pyunlearn.errors import ArgumentError, DataError, ModelError
from pyunlearn.models.adapters import with_lora
from pyunlearn.models.config import LoadOptions
from pyunlearn.models.from_scratch import train_tokenizer
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.unlearning import machines, planning
from pyunlearn.unlearning import parts as parts_of_a_plan
from pyunlearn.unlearning.config import UnlearnConfig
from pyunlearn.unlearning.machines import GPUS, Machine, machine_of
from pyunlearn.unlearning.optimizer import TrainedWeights
from pyunlearn.unlearning.parts import (
    ACCEPTED,
    ACTIVATIONS,
    BEFORE_FINE_TUNING,
    CHECKPOINT,
    FINE_TUNING,
    GRADIENTS,
    HEAD,
    MASK,
    MOMENTS,
    OTHERS,
    RESTS,
    TRAINED,
    UNROUNDED,
    Part,
    static_parts,
    update_bytes,
)
from pyunlearn.unlearning.schedule import ROBUST

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENIZER = train_tokenizer(["the cat sees a dog and the king likes my aunt"] * 3, 60)
FORGET = ["the king likes my aunt and the cat sees a dog", "a dog sees the cat"]
RETAIN = ["my aunt likes the king", "the cat likes a dog and a dog likes the cat and my aunt"]


@pytest.fixture
def saved(tmp_path):
    """A folder with a configuration in float32 and a tokenizer: a model without its weights."""
    where = tmp_path / "model"
    tf.LlamaConfig(**KV | {"vocab_size": 64}, tie_word_embeddings=True, dtype="float32").save_pretrained(where)
    TOKENIZER.save_pretrained(where)
    return where


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Plan for the CPU of this machine, whose speed is not measured."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(planning, "measured_rate", lambda rows, width, dtype: 1e9)


def sizes(plan):
    """Return name -> bytes on the device."""
    return {part.name: part.device for part in plan.memory.parts}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lora", [None, 4])
@pytest.mark.parametrize("eight", [False, True])
def test_the_parts_are_what_a_run_has(dtype, lora, eight):
    """Weights, gradients, moments, rests, accepted state and its moments: as the optimizer has them after a step."""
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**KV, tie_word_embeddings=True)).to(dtype)
    if lora:
        model = with_lora(LanguageModel.described(model, None), lora, 0).module
    weights = TrainedWeights(model, 1e-3, resumable=True, clipped_to=1.0 if eight else None)
    for p in weights.parameters.values():
        p.grad = torch.ones_like(p)
    weights.optimizer.step()
    weights.accept()

    def bytes_of(tensors):
        return sum(t.numel() * t.element_size() for t in tensors)

    trained = list(weights.parameters.values())
    state = weights.optimizer.state.values()
    expected = {
        TRAINED: bytes_of(trained),
        OTHERS: bytes_of([*model.parameters(), *model.buffers()]) - bytes_of(trained),
        GRADIENTS: bytes_of(p.grad for p in trained),
        MOMENTS: bytes_of(values["second"] for values in state),
        RESTS: bytes_of(weights.optimizer.rests.values()),
        ACCEPTED: bytes_of(t for each in weights._accepted.values() for t in each.values()),
        CHECKPOINT: bytes_of(values["second"] for values in weights._accepted_moments.values()),
    }
    parts = static_parts(model, UnlearnConfig(moments_in_8bit=eight), "cpu", checkpoint=True)
    assert {part.name: part.device for part in parts} == {name: size for name, size in expected.items() if size}
    assert not any(part.main for part in parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_for_a_gguf_file_holds_unrounded_weights(dtype):
    """In float32, in the place of the rests of 16-bit weights; an adapter is not rounded, and has none."""
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**KV, tie_word_embeddings=True)).to(dtype)
    formats = dict.fromkeys(model.parameters(), "Q4_1")
    optimizer = TrainedWeights(model, 1e-3, formats=formats).optimizer
    parts = static_parts(model, UnlearnConfig(gguf_like="served.gguf"), "cpu", checkpoint=False)
    own = {part.name: part.device for part in parts}
    assert own[UNROUNDED] == sum(4 * p.numel() for p in model.parameters())
    assert own[UNROUNDED] == sum(rest.nbytes for rest in optimizer.rests.values())
    assert own[ACCEPTED] == own[TRAINED] + own[UNROUNDED]
    assert RESTS not in own
    adapted = with_lora(LanguageModel.described(model, None), 4, 0).module
    config = UnlearnConfig(gguf_like="served.gguf", lora=4, merge=True)
    assert UNROUNDED not in [part.name for part in static_parts(adapted, config, "cpu", checkpoint=False)]


def test_a_plan_for_a_gguf_file_refuses_what_the_run_does(saved):
    """A file that is not there; what is recommended can be run."""
    with pytest.raises(ModelError, match=r"the GGUF file no.gguf was not found"):
        pyunlearn.plan(saved, FORGET, gguf_like="no.gguf")
    config, loading = UnlearnConfig(gguf_like="served.gguf"), LoadOptions()
    recommended = list(planning.combinations(config, loading, is_float32=True))
    assert any("lora" in options for options in recommended)
    assert all(options.get("merge") for options in recommended if "lora" in options)
    assert not any("load_in_4bit" in options for options in recommended)


def test_what_a_gpu_does_not_hold_is_in_main_memory():
    """The accepted state and its moments, each tensor in the next power of two, as pinned memory is allocated."""
    model = torch.nn.Linear(10, 10)  # 400 and 40 bytes
    parts = {part.name: part for part in static_parts(model, UnlearnConfig(mask="nonzero"), "cuda", checkpoint=True)}
    for name in (ACCEPTED, CHECKPOINT):
        assert (parts[name].device, parts[name].main) == (0, 512 + 64)
    assert (parts[MASK].device, parts[MASK].main) == (110, 0)
    assert CHECKPOINT not in [part.name for part in static_parts(model, UnlearnConfig(), "cuda", checkpoint=False)]
    assert (parts[MOMENTS].device, parts[MOMENTS].main) == (440, 0)
    config = UnlearnConfig(offload_optimizer=True)
    offloaded = {part.name: part for part in static_parts(model.bfloat16(), config, "cuda", checkpoint=False)}
    assert [(offloaded[name].device, offloaded[name].main) for name in (MOMENTS, RESTS)] == [
        (0, 512 + 64),
        (0, 256 + 32),
    ]


def test_the_optimizers_temporary_tensors_are_chunks():
    """They do not grow with the parameter, and 16-bit weights need more of them."""
    rows = [nn_bytes(n, dtype) for n in (1 << 23, 1 << 25) for dtype in (torch.float32, torch.bfloat16)]
    assert rows[:2] == rows[2:]
    assert rows[1] > rows[0] >= 2 * 4 * (1 << 22)


@pytest.mark.parametrize(
    ("device", "has", "variable", "mixed"),
    [
        *(("cpu", True, "", False), ("cpu", True, "bf16", True)),
        *(("cuda", True, "", True), ("cuda", False, "", False), ("cuda", False, "bf16", True)),
    ],
)
def test_float32_weights_are_planned_in_the_precision_of_the_run(monkeypatch, device, has, variable, mixed):
    """In bfloat16 on a GPU that has it, and elsewhere where accelerate is told so; 16-bit weights never are."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", variable)
    machine = Machine("a machine", device, None, bfloat16=has)
    for dtype, expected in ((torch.float32, mixed), (torch.bfloat16, False)):
        lm = types.SimpleNamespace(module=torch.nn.Linear(2, 2, dtype=dtype))
        assert parts_of_a_plan._runtime(lm, UnlearnConfig(), machine).autocast is expected


def nn_bytes(count, dtype):
    """Return the temporary bytes of an update of `count` weights."""
    return update_bytes(torch.nn.Linear(count // 64, 64, bias=False, dtype=dtype, device="meta"))


def test_no_weights_are_loaded(saved):
    """The folder has none: parts by dtype, a tied embedding once, and the sum of the parts."""
    plan = pyunlearn.plan(saved, FORGET, retain=RETAIN)
    model = tf.LlamaForCausalLM(tf.LlamaConfig.from_pretrained(saved))
    assert plan.parameters == plan.trained == sum(p.numel() for p in model.parameters())
    parts = sizes(plan)
    assert parts[TRAINED] == parts[GRADIENTS] == parts[MOMENTS] == parts[ACCEPTED] == 4 * plan.parameters
    assert CHECKPOINT not in parts
    assert parts[ACTIVATIONS] > 0 < parts[HEAD]
    assert plan.memory.device == sum(parts.values())
    assert sizes(pyunlearn.plan(saved, FORGET, retain=RETAIN, output_dir="new"))[CHECKPOINT] == 4 * plan.parameters
    assert plan.fits
    assert plan.options == {}
    assert (plan.steps, plan.most_steps) == (16, 200)
    json.dumps(plan.to_dict())


def test_each_option_lowers_the_memory(saved):
    """A 16-bit dtype, gradient checkpointing, one text at a time, an adapter, 4-bit weights."""
    narrow = LoadOptions(dtype="bfloat16")
    base = sizes(pyunlearn.plan(saved, FORGET * 3, retain=RETAIN))
    assert sizes(pyunlearn.plan(saved, FORGET * 3, retain=RETAIN, loading=narrow))[RESTS] == base[TRAINED] / 2
    for options in ({"gradient_checkpointing": True}, {"micro_batch_size": 1}):
        assert sizes(pyunlearn.plan(saved, FORGET * 3, retain=RETAIN, **options))[ACTIVATIONS] < base[ACTIVATIONS]
    adapter = pyunlearn.plan(saved, FORGET, loading=narrow, lora=4)
    linear = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    assert adapter.trained == 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    assert sizes(adapter)[MOMENTS] == 4 * adapter.trained
    quantized = pyunlearn.plan(saved, FORGET, loading=replace(narrow, load_in_4bit=True), lora=4)
    assert quantized.parameters == adapter.parameters
    assert sizes(adapter)[OTHERS] - sizes(quantized)[OTHERS] == pytest.approx(linear * (2 - 0.5 - 1 / 64), rel=1e-3)


def test_the_cheapest_options_that_fit_are_named(saved):
    """None where it fits; else the first combination that does; nothing where none does."""
    plan = pyunlearn.plan(saved, FORGET, retain=RETAIN, gpu=24)
    assert (plan.fits, plan.options, plan.memory_then) == (True, {}, plan.memory)
    enough = plan.memory.device + machines.CONTEXT
    whole = pyunlearn.plan(saved, FORGET, retain=RETAIN, gpu=(enough + 10) / 1e9)
    assert (whole.fits, whole.options) == (True, {})
    less = pyunlearn.plan(saved, FORGET, retain=RETAIN, gpu=(enough - 10) / 1e9)
    assert (less.fits, less.options) == (False, {"gradient_checkpointing": True})
    assert less.memory_then.device < plan.memory.device
    nothing = pyunlearn.plan(saved, FORGET, gpu=0.1, max_grad_norm=0)  # with which moments in 8 bits cannot be tried
    assert (nothing.fits, nothing.options, nothing.memory_then) == (False, None, None)
    assert "does not fit a GPU with 0.1 GB" in nothing.line


def test_the_order_of_price():
    """Time before rounding before an adapter before 4 bits."""
    every = list(planning.combinations(UnlearnConfig(), LoadOptions(), is_float32=True))
    assert every[0] == {"gradient_checkpointing": True}
    assert every[3] == {"dtype": "bfloat16"}
    assert every[7] == {"dtype": "bfloat16", "lora": 16}
    assert every[-1] == {
        "dtype": "bfloat16",
        "lora": 16,
        "load_in_4bit": True,
        "gradient_checkpointing": True,
        "micro_batch_size": 1,
    }
    assert len(every) == 15
    config = UnlearnConfig(gradient_checkpointing=True, micro_batch_size=1, lora=8)
    assert [*planning.combinations(config, LoadOptions(), is_float32=False)] == [{"load_in_4bit": True}]
    on_gpu = planning.combinations(UnlearnConfig(), LoadOptions(), is_float32=False, on_gpu=True)
    recompute, slower = {"gradient_checkpointing": True}, []
    for less in ({"moments_in_8bit": True}, {"offload_optimizer": True}):
        slower += [less, recompute | less, recompute | {"micro_batch_size": 1} | less]
    assert list(on_gpu)[3:9] == slower


def test_machines_by_name_and_size():
    """Names are read as people write them; an unknown or ambiguous one, and a wrong number, is one sentence."""
    for name, as_written in {
        "H100-80": "h100",
        "A100-80": "NVIDIA A100 80GB",
        "RTX4090-24": "GeForce RTX 4090",
        "T4-16": "Tesla T4",
        "L4-24": "L4",
    }.items():
        assert machine_of(as_written).name == name
    assert machine_of("24").memory == machine_of(24.0).memory == machine_of("24 GB").memory == 24 * 10**9
    assert all(machine_of(name).memory > 0.9 * 2**30 * int(name.rpartition("-")[2]) for name in GPUS)
    for wrong in ("A100", "banana", -3, 0, "nan", 1e300, True):
        with pytest.raises(ArgumentError, match=r"^gpu must be"):
            machine_of(wrong)
    with pytest.raises(ArgumentError, match=r"A100-40, A100-80, or a number"):
        machine_of("a100")


def test_what_the_run_would_refuse_is_not_planned(saved):
    """A merge without an adapter, and an argument that needs another one."""
    with pytest.raises(ArgumentError, match="merge needs a model with an adapter"):
        pyunlearn.plan(saved, FORGET, merge=True)
    with pytest.raises(ArgumentError, match="pass some of it as retain="):
        pyunlearn.plan(saved, FORGET, order="easy_first", difficulty="ksd")


def test_the_time_is_that_of_the_texts_of_both_losses(saved):
    """Less without a retain loss; without a retain set the run holds texts of its own."""
    both, forget, own = (
        pyunlearn.plan(saved, FORGET, gpu="H100", **options).seconds
        for options in ({"retain": RETAIN}, {"retain": RETAIN, "retain_loss": None}, {})
    )
    assert forget < 0.9 * min(both, own)


def test_a_round_scores_a_part_of_the_holdout(saved):
    """About a thousand tokens of it, and none of it where it has no budget."""
    texts, both = [f"a cat sees {i} dogs {i}" for i in range(1600)], {"gpu": "H100", "retain": RETAIN}
    few, many = (pyunlearn.plan(saved, FORGET, holdout=texts[:n], **both).seconds for n in (200, 1600))
    assert few == pytest.approx(many, rel=0.1)
    assert pyunlearn.plan(saved, FORGET, holdout=texts, holdout_budget=None, **both).seconds < few


def test_this_machine_has_free_memory():
    """A positive number on Linux, with which the plan is compared."""
    machine = machine_of(None)
    assert machine.here
    assert machine.memory is None or machine.memory > 10**8


def test_unknown_memory_may_fit(saved, monkeypatch):
    """Then nothing is said about what fits."""
    monkeypatch.setattr(planning, "machine_of", lambda gpu: Machine("this machine", "cpu", None, here=True))
    plan = pyunlearn.plan(saved, FORGET)
    assert plan.fits is None
    assert plan.line.startswith("may fit this machine (memory unknown)")


def test_the_time_is_that_of_the_operations(saved):
    """At half of the measured speed on the CPU; at a share of its peak on a named GPU; unknown for a number of GB."""
    here = pyunlearn.plan(saved, FORGET, retain=RETAIN)
    named = pyunlearn.plan(saved, FORGET, retain=RETAIN, gpu="H100")
    assert here.seconds / named.seconds == pytest.approx(989e12 * machines.UTILIZATION / 0.5e9, rel=0.2)
    assert "989 TFLOP/s of its data sheet, not measured" in named.time_line
    assert pyunlearn.plan(saved, FORGET, gpu=24).seconds is None
    # a forward pass takes two operations for each parameter and id, plus attention; a backward pass twice as many
    assert 1 < here.memory.operations_scored / (2 * here.parameters) < 2
    assert 2.2 < here.memory.operations_trained / here.memory.operations_scored < 3.2


def test_a_robust_run_holds_the_weights_before_fine_tuning_and_its_moments(saved):
    """The copy is in the main memory, the moments where the run's own are; the time is that of the plain run."""
    plain, robust = (pyunlearn.plan(saved, FORGET, retain=RETAIN, gpu="H100", robust=r) for r in (False, True))
    own, added = 4 * plain.trained, set(robust.memory.parts) - set(plain.memory.parts)
    assert added == {Part(BEFORE_FINE_TUNING, 0, own), Part(FINE_TUNING, own)}
    assert robust.most_steps == ROBUST * plain.most_steps
    assert robust.seconds == pytest.approx(plain.seconds, rel=0.2)
    assert "four to eleven times the time" in robust.time_line
    here = sizes(pyunlearn.plan(saved, FORGET, retain=RETAIN, robust=True))
    assert here[BEFORE_FINE_TUNING] == here[FINE_TUNING] == own


def test_more_texts_take_more_steps(saved):
    """Sixteen steps for each eight texts."""
    assert pyunlearn.plan(saved, [f"{text} {n}" for n in range(8) for text in FORGET], retain=RETAIN).steps == 32


def test_measured_speed_is_positive():
    """A matrix product of 0.3 s."""
    assert machines.measured_rate(64, 64, torch.float32) > 1e6


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gpu": "X9"}, ArgumentError, "gpu must be one of A100-40"),
        ({"batch_size": 0}, ArgumentError, "batch_size must be"),
        ({"colour": 1}, ArgumentError, "plan has no option 'colour'"),
        ({"forget": "nowhere.jsonl"}, DataError, "nowhere.jsonl"),
        ({"model": 7}, ModelError, "model must be a path or a name"),
        ({"model": "./nowhere"}, ModelError, "nothing is there"),
        ({"loading": LoadOptions(load_in_4bit=True)}, ArgumentError, "4-bit weights do not train"),
        ({"loading": "bfloat16"}, ArgumentError, "loading must be a LoadOptions, got 'bfloat16'"),
    ],
)
def test_wrong_arguments_are_refused(saved, change, error, message):
    """In one sentence."""
    with pytest.raises(error, match=message) as raised:
        pyunlearn.plan(**{"model": saved, "forget": FORGET} | change)
    assert "\n" not in str(raised.value)


def test_the_command_prints_the_parts_and_the_command_that_fits(saved, call, tmp_path):
    """Exit code 1 where it does not fit; the command runs with the same options and those in addition."""
    (tmp_path / "forget.txt").write_text("\n".join(FORGET))
    words = ["plan", "model", "--forget", "forget.txt", "--reference-model", "base", "--batch-size", 4]
    free = json.loads(call(*words, "--gpu", 24, "--json")[1])["memory"]["parts"]
    size = (sum(part["device"] for part in free) + machines.CONTEXT - 10) / 1e9
    code, out, err = call(*words, "--gpu", size)
    assert (code, err) == (1, "")
    assert "main memory, GB" in out
    assert "does not fit a GPU" in out
    files = "--forget forget.txt --reference-model base"
    assert f"  pyunlearn unlearn model {files} --gradient-checkpointing --batch-size 4" in out.splitlines()
    code, out, err = call(*words, "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert facts["fits"] is True
    assert facts["command"] == f"pyunlearn unlearn model {files} --batch-size 4"
    assert {part["name"] for part in facts["memory"]["parts"]} >= {TRAINED, GRADIENTS, MOMENTS, ACCEPTED, CHECKPOINT}
    assert call(*words, "--gpu", "-1")[0] == 2
    assert "planned for one GPU; --device auto" in call(*words, "--gpu", 24, "--device", "auto")[1]
    if not torch.cuda.is_available():
        assert "planned for one GPU" not in call(*words, "--device", "auto")[1]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the resident set from /proc")
@pytest.mark.parametrize(
    ("dtype", "options"),
    slow(("float32", {}), ("bfloat16", {"gradient_checkpointing": True}), ("bfloat16", {"lora": 16})),
)
def test_the_plan_is_within_15_percent_of_the_measured_peak(dtype, options, tmp_path):
    """The resident set of a run in a process of its own, on a model of 34 million random weights."""
    words = [sys.executable, Path(__file__).with_name("planned_memory.py"), tmp_path, dtype, json.dumps(options)]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(pyunlearn.__file__).parents[1])}
    out = subprocess.run(list(map(str, words)), env=variables, check=True, capture_output=True, text=True).stdout
    row = json.loads(out.splitlines()[-1])
    assert row["planned"] == pytest.approx(row["peak"], rel=0.15)
