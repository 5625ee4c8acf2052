"""How a command loads its model: in the dtype in which it was saved, and with the options that all commands share."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from test_cli import folder, refused, trained  # noqa: F401

from pyunlearn.errors import ArgumentError
from pyunlearn.models import load
from pyunlearn.models.config import LoadOptions
from pyunlearn.models.loading import load_options


@pytest.fixture
def narrow(trained, tmp_path_factory):  # noqa: F811
    """A folder with the model saved in bfloat16."""
    where = tmp_path_factory.mktemp("narrow") / "model"
    trained.fresh().bfloat16().save_pretrained(where)
    trained.tokenizer.save_pretrained(where)
    return where


def dtypes(where):
    """Return the dtypes of the tensors that a folder holds."""
    file = next(path for name in ("model", "adapter_model") if (path := where / f"{name}.safetensors").exists())
    with safe_open(file, "pt") as tensors:
        return {tensors.get_tensor(name).dtype for name in tensors.keys()}  # noqa: SIM118


@pytest.mark.parametrize("command", ["unlearn", "edit", "audit", "compare"])
def test_a_bfloat16_folder_comes_back_in_bfloat16(command, call, folder, narrow, tmp_path):  # noqa: F811
    """Of the same size; audit and compare read it as it is."""
    texts = ["--forget", folder / "forget.jsonl", "--retain", folder / "retain.jsonl"]
    own = {
        "unlearn": ["--max-steps", 2, "--learning-rate", 3e-4],
        "edit": ["--edit", "prune"],
        "audit": [],
        "compare": ["--methods", "ga", "--max-steps", 1],
    }[command]
    code, out, err = call(command, narrow, *texts, *own, "--out", "new", "--quiet")
    assert (code in (0, 1), err) == (True, "")
    assert out
    written = {"unlearn": "result.json", "audit": "audit.json"}
    if command in written:
        assert json.loads((tmp_path / "new" / written[command]).read_text())["settings"]["weights"] == "bfloat16"
    if command in ("unlearn", "edit"):
        assert dtypes(tmp_path / "new") == {torch.bfloat16}
        sizes = [(where / "model.safetensors").stat().st_size for where in (narrow, tmp_path / "new")]
        assert sizes[0] == pytest.approx(sizes[1], rel=0.01)


def test_another_dtype_and_the_device_are_chosen(call, folder, narrow, tmp_path, monkeypatch):  # noqa: F811
    """The result is saved in that dtype."""
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")  # removed again after the test
    options = ["--dtype", "float32", "--device", "cpu", "--attn-implementation", "eager", "--max-steps", 0, "--quiet"]
    assert call("unlearn", narrow, "--forget", folder / "forget.jsonl", *options, "--out", "new")[0] in (0, 1)
    assert dtypes(tmp_path / "new") == {torch.float32}
    with load_options(LoadOptions(attn_implementation="eager")):
        assert load(narrow)[0].config._attn_implementation == "eager"
    assert load(narrow)[0].config._attn_implementation == "sdpa"


@pytest.mark.parametrize("device", ["cuda:97", "gpu", "meta x"])
def test_a_device_that_is_not_there_is_refused(device, call, folder, tmp_path):  # noqa: F811
    """In one sentence that names what is there, before anything is read."""
    result = call("audit", folder / "model-1.5", "--forget", "none.jsonl", "--device", device)
    assert "device must be one that this machine has (cpu" in refused(result, tmp_path)


@pytest.mark.parametrize(
    ("device", "message"),
    [("cuda", r"one that this machine has \(cpu.*, got 'cuda:1'"), ("cuda:0", "would be shared by all processes")],
)
def test_each_process_of_a_launcher_has_its_own_gpu(device, message, monkeypatch):
    """The first would otherwise hold the weights of all."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ArgumentError, match=message), load_options(LoadOptions(device=device)):
        pass


def test_a_revision_is_looked_up_on_the_hub(call, folder, monkeypatch):  # noqa: F811
    """The option, and @REVISION after the name of any model."""
    requests, texts = [], ["--forget", folder / "forget.jsonl"]

    def from_pretrained(name, **options):
        requests.append((name, options.get("revision")))
        raise OSError("nothing there")

    monkeypatch.setattr(tf.AutoConfig, "from_pretrained", from_pretrained)
    for words in (["us/model", "--revision", "v1.0"], ["us/model@v1.0"]):
        code, _, err = call("audit", *words, *texts)
        assert code == 2
        assert "us/model@v1.0" in err
    call("audit", folder / "model-1.5", "--reference-model", "us/base@0a1b", *texts)
    assert requests == [("us/model", "v1.0")] * 2 + [("us/base", "0a1b")]


@pytest.mark.parametrize("words", [["model-1.5", "--revision", "v1"], ["model-1.5@v1"]])
def test_a_folder_has_no_revision(words, call, folder, tmp_path, monkeypatch):  # noqa: F811
    """One sentence, where transformers would load the folder and pass over the revision."""
    monkeypatch.chdir(folder)
    err = refused(call("audit", *words, "--forget", folder / "forget.jsonl"), tmp_path)
    assert "model-1.5 is a folder on this machine, and v1 would be a revision on the hub" in err


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
def test_an_adapter_keeps_its_dtype(saved, trained, narrow, tmp_path):  # noqa: F811
    """It need not be that of the model below it; with a dtype given, both have it."""
    base = type(trained.model).from_pretrained(narrow, dtype=torch.bfloat16)
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapter = [p for p in adapted.parameters() if p.requires_grad]
    for p in adapter:
        p.data = p.data.to(saved)
    adapted.save_pretrained(tmp_path / "adapter")
    model, _ = load(tmp_path / "adapter", tokenizer=trained.tokenizer)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {saved}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    loaded = [p for p in model.parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(adapter, loaded, strict=True))
    model.save_pretrained(tmp_path / "again")
    assert dtypes(tmp_path / "again") == {saved}
    whole, _ = load(tmp_path / "adapter", tokenizer=trained.tokenizer, dtype=torch.float32)
    assert {p.dtype for p in whole.parameters()} == {torch.float32}


def test_a_run_in_bfloat16_forgets(call, folder, narrow, tmp_path):  # noqa: F811
    """With the dtype in which the model came."""
    texts = ["--forget", folder / "forget.jsonl", "--retain", folder / "retain.jsonl"]
    holdout = ["--holdout", folder / "holdout.jsonl", "--learning-rate", 3e-4]
    assert call("unlearn", narrow, *texts, *holdout, "--out", "new", "--quiet")[0] == 0
    result = json.loads((tmp_path / "new" / "result.json").read_text())
    assert {e["verdict"] for e in result["examples"]} == {"forgotten"}
    assert dtypes(tmp_path / "new") == {torch.bfloat16}


def test_no_bar_of_a_library_is_shown():
    """Libraries load tqdm before a command begins: it is told before."""
    code = "from pyunlearn.cli.main import main\ntry:\n main()\nfinally:\n import tqdm\n list(tqdm.tqdm(range(3)))"
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    words = [sys.executable, "-c", code, "--version"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
