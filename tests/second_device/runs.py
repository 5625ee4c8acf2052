"""Run the package on the models in a folder, with their layers on two devices, and print its numbers as JSON.

Usage: python runs.py LIBRARY FOLDER. In a process of its own, for a backend that is registered stays.
"""

from __future__ import annotations

import json
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import tiny  # noqa: E402
import torch  # noqa: E402
import two_devices  # noqa: E402
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM  # noqa: E402

import pyunlearn  # noqa: E402
from pyunlearn import edits  # noqa: E402
from pyunlearn.cli import main as cli  # noqa: E402
from pyunlearn.errors import PyunlearnError  # noqa: E402
from pyunlearn.models import load_tokenizer  # noqa: E402
from pyunlearn.models.condition import is_spread  # noqa: E402
from pyunlearn.models.devices import use_device  # noqa: E402
from pyunlearn.models.loading import quiet_transformers  # noqa: E402

A, B = "second:0", "second:1"
LLAMA = {"model.embed_tokens": A, "model.rotary_emb": A, "model.layers.0": A, "model.layers.1": B, "model.norm": B}
GPT2 = {f"transformer.{name}": A for name in ("wte", "wpe", "drop", "h.0")}
GPT2 |= {"transformer.h.1": B, "transformer.ln_f": B, "lm_head": A}
T5 = {"shared": A, "encoder": A, "decoder.embed_tokens": A, "decoder.block.0": A, "decoder.block.1": B}
T5 |= {"decoder.final_layer_norm": B, "decoder.dropout": B, "lm_head": A}
LAST = LLAMA | {"lm_head": B}
EVERY = ("unlearn", "audit", "edit", "attack", "compare", "npo and kl", "own texts", "rmu", "undial", "lora", "mask")
CASES: dict[str, tuple[str, dict[str, str], tuple[str, ...]]] = {
    "head on the last device": ("llama", LAST, EVERY),
    "head on the first device": ("llama", LLAMA | {"lm_head": A}, ("unlearn", "audit", "npo and kl", "rmu")),
    "tied head": ("gpt2", GPT2, ("unlearn", "audit")),
    "encoder-decoder": ("t5", T5, ("unlearn", "audit")),
    "one device": ("llama", {"": B}, ("unlearn", "audit")),
}
"""Name of a case -> the model, where its layers are, and the functions that run on it."""

ROWS: dict[str, Any] = {"llama": tiny.sentences, "gpt2": tiny.facts, "t5": tiny.pairs}
Numbers = dict[str, Any]


def load(folder: Path, kind: str, **options: Any) -> Any:
    """Load the model of that kind."""
    auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    return auto.from_pretrained(folder / kind, **options).eval()


def numbers(
    fresh: Callable[[], Any], reference: Callable[[], Any], tokenizer: Any, kind: str, names: Collection[str]
) -> dict[str, Numbers]:
    """Return name of a function -> its numbers, each on a model of its own; `reference` loads the reference model."""
    rows = ROWS[kind]
    forget, retain, holdout = rows(2, 3), rows(40, 2), rows(45, 6)
    common = {"tokenizer": tokenizer, "progress": False}
    every: dict[str, Any] = common | {"retain": retain, "holdout": holdout}

    def unlearn(model: Any, **options: Any) -> Numbers:
        settings = {"method": "ga", "max_steps": 3, "learning_rate": 3e-4} | options
        result = pyunlearn.unlearn(model, forget, **(every | settings))
        return {
            "stopped": result.stopped,
            "log-likelihoods": [e.log_likelihood_after for e in result.examples],
            "gradients": [record["gradient_norm"] for record in result.history],
            "weights": [float(p.detach().double().abs().mean()) for p in result.model.parameters()],
        }

    def audit(model: Any) -> Numbers:
        examples = pyunlearn.audit(model, forget, **every).examples
        return {"exposures": [e.exposure for e in examples], "measures": [vars(e.now) for e in examples]}

    def edit(model: Any) -> Numbers:
        before = [p.detach().cpu().clone() for p in model.parameters()]
        result = edits.fisher_step(model, forget, retain=retain, **common)
        result.undo()
        same = all(torch.equal(p.detach().cpu(), b) for p, b in zip(model.parameters(), before, strict=True))
        return {"nll": list(result.nll_after.values()), "norm": result.diagnostics["step_norm"], "undone": same}

    def attack(model: Any) -> Numbers:
        settings: dict[str, Any] = {"relearning_steps": 4, "relearning_rate": 3e-4, "folds": 2}
        result = pyunlearn.attack(model, forget, attacks=["relearning", "quantization"], **every, **settings)
        return {"exposures": [list(e.exposures.values()) for e in result.examples]}

    def compare(model: Any) -> Numbers:
        table = pyunlearn.compare(model, forget, methods=["ga", "npo"], max_steps=2, plot=False, **every)
        utilities = [None if row.calibrated is None else row.calibrated.utility for row in table.rows]
        return {"status": [row.status for row in table.rows], "utilities": utilities}

    functions = {"unlearn": unlearn, "audit": audit, "edit": edit, "attack": attack, "compare": compare}
    more: dict[str, Any] = {
        "npo and kl": {"method": "npo", "retain_loss": "kl"},
        "own texts": {"retain": None, "holdout": None},  # the retain set is sampled from the model
        "rmu": {"method": "rmu"},
        "undial": {"method": "undial"},
        "lora": {"lora": 4, "merge": True, "learning_rate": 1e-3},
        "mask": {"mask": "saliency", "offload_optimizer": True, "gradient_checkpointing": True},
    }
    if "npo and kl" in names:
        more["npo and kl"]["reference_model"] = reference()
    functions |= {name: partial(unlearn, **options) for name, options in more.items()}
    return {name: functions[name](fresh()) for name in names}


def of_case(folder: Path, name: str) -> dict[str, Any]:
    """Return the numbers of one case; its model stays where it is, as `places` says."""
    kind, places, names = CASES[name]
    models: list[Any] = []

    def fresh(device_map: dict[str, str] = places) -> Any:
        models.append(load(folder, kind, device_map=device_map))
        return models[-1]

    def reference() -> Any:  # its head is on the first device
        return fresh(LLAMA | {"lm_head": A})

    tokenizer = load_tokenizer(folder / kind)
    own = numbers(fresh, reference, tokenizer, kind, names)
    return own | {"places": [_places(model) for model in models]}


def _places(model: Any) -> list[str]:
    return sorted({str(p.device) for p in model.parameters()})


def resumed(folder: Path) -> dict[str, list[float]]:
    """Return the gradient norms of a run that was interrupted after two steps and resumed, and of one that was not."""
    rows, tokenizer = ROWS["llama"], load_tokenizer(folder / "llama")
    options: dict[str, Any] = {"tokenizer": tokenizer, "holdout": rows(45, 6), "method": "ga", "max_steps": 4}
    options |= {"learning_rate": 3e-5, "progress": False, "checkpoint_every": 1}

    def run(**own: Any) -> Any:
        model = load(folder, "llama", device_map=LAST)
        return pyunlearn.unlearn(model, rows(2, 3), **options, **own)

    def stop(record: dict[str, Any]) -> None:
        if record["step"] >= 2:
            raise RuntimeError("stopped here")

    with tempfile.TemporaryDirectory() as out:
        with suppress(RuntimeError):
            run(output_dir=Path(out) / "run", on_step=stop)
        again = run(output_dir=Path(out) / "run", resume=True)
    whole = run()
    return {name: [r["gradient_norm"] for r in x.history] for name, x in (("resumed", again), ("whole", whole))}


def refused(folder: Path) -> dict[str, str]:
    """Return name -> the sentence with which such a model is refused."""
    from accelerate import dispatch_model

    tokenizer = load_tokenizer(folder / "gpt2")
    apart = dispatch_model(load(folder, "gpt2"), GPT2 | {"lm_head": B})
    spread = load(folder, "llama", device_map=LAST)
    common: dict[str, Any] = {"tokenizer": tokenizer, "progress": False}
    refused = {"shared weights apart": _sentence(lambda: pyunlearn.audit(apart, ROWS["gpt2"](2, 3), **common))}
    launched = types.SimpleNamespace(count=2, sharded=False)
    with mock.patch("pyunlearn.unlearning.api.processes_of", return_value=launched):
        refused["several processes"] = _sentence(lambda: pyunlearn.unlearn(spread, ROWS["llama"](2, 3), **common))
    return refused


def _sentence(call: Callable[[], Any]) -> str:
    try:
        call()
    except PyunlearnError as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


def commands(folder: Path) -> dict[str, Any]:
    """Return the numbers of commands with `--device second:1`, on a backend that has no kernels of this package."""
    import typer.testing

    texts = folder / "texts"
    texts.mkdir()
    for role, count, seed in (("forget", 2, 3), ("retain", 40, 2), ("holdout", 45, 6)):
        lines = [json.dumps({"text": text}) for text in tiny.sentences(count, seed)]
        (texts / f"{role}.jsonl").write_text("\n".join(lines))

    def command(name: str, *words: str, roles: tuple[str, ...] = ("forget", "retain", "holdout")) -> Any:
        files = [word for role in roles for word in (f"--{role}", str(texts / f"{role}.jsonl"))]
        line = [name, str(folder / "llama"), *files, "--device", B, "--json", *words]
        outcome = typer.testing.CliRunner().invoke(cli.program(), line)
        assert outcome.exit_code in (0, 1), (outcome.output, outcome.exception)
        return json.loads(outcome.stdout)

    run = ("--method", "ga", "--max-steps", "3", "--learning-rate", "3e-4", "--out", str(folder / "out"))
    unlearned, audited = command("unlearn", *run), command("audit", "--out", str(folder / "audited"))
    edited = command("edit", "--edit", "prune", "--out", str(folder / "edited"), roles=("forget", "retain"))
    return {
        "unlearn": [e["log_likelihood_after"] for e in unlearned["examples"]],
        "audit": [e["exposure"] for e in audited["examples"]],
        "edit": sorted(edited["nll_after"]),
    }


def main(library: str, folder: Path) -> dict[str, Any]:
    """Run everything."""
    two_devices.register(Path(library))
    use_device(B)
    warnings.filterwarnings("error", message=".*own logits")  # the fused path is used
    torch.set_num_threads(1)
    quiet_transformers()
    assert is_spread(load(folder, "llama", device_map=LAST))
    return {
        "numbers": {name: of_case(folder, name) for name in CASES},
        "resumed": resumed(folder),
        "refused": refused(folder),
        "commands": commands(folder),
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
