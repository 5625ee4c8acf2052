"""Memory of an unlearning run, in bytes a parameter: full float32 and bfloat16, LoRA, and LoRA on 4-bit weights.

    python -m benchmarks.memory

A new process for each configuration loads SmolLM2-135M (or `--model`), saved in the configuration's dtype, and takes
three optimizer steps of `pyunlearn.unlearn` on the demo's texts, with the output folder that makes it store a
checkpoint. Its peak resident set, less what it was before the model was loaded, is divided by the number of parameters;
so it includes activations, logits and what scoring needs. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "full, float32": {"dtype": "float32"},
    "full, bfloat16": {"dtype": "bfloat16"},
    "full, bfloat16, gradient checkpointing": {"dtype": "bfloat16", "gradient_checkpointing": True},
    "LoRA 16, bfloat16": {"dtype": "bfloat16", "lora": 16},
    "LoRA 16, bfloat16, gradient checkpointing": {"dtype": "bfloat16", "lora": 16, "gradient_checkpointing": True},
    "LoRA 16, 4-bit, gradient checkpointing": {
        "dtype": "bfloat16",
        "lora": 16,
        "load_in_4bit": True,
        "gradient_checkpointing": True,
    },
}


def main() -> None:
    """Parse the options, measure each configuration in a process of its own, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="another model than SmolLM2-135M: a folder or a name")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps (default 3)")
    parser.add_argument("--configurations", nargs="+", default=list(CONFIGURATIONS), help="names (default: all)")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measured(**json.loads(options.child))))
        return
    print("| configuration | trained parameters | peak, MB | bytes a parameter |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.configurations:
            settings = dict(CONFIGURATIONS[name])
            where = Path(temporary) / settings["dtype"]
            task = {"model": options.model, "where": str(where), "steps": options.steps, "settings": settings}
            for stage in ("save", "measure"):
                words = [sys.executable, "-m", "benchmarks.memory", "--child", json.dumps(task | {"stage": stage})]
                out = subprocess.run(words, check=True, capture_output=True, text=True).stdout
            row = json.loads(out.splitlines()[-1])
            size = row["bytes"] / row["parameters"]
            print(f"| {name} | {row['trained']:,} | {row['bytes'] / 1e6:,.0f} | {size:.1f} |", flush=True)


def measured(model: str | None, where: str, steps: int, settings: dict[str, Any], stage: str) -> dict[str, Any]:
    """Save the model in a dtype, or run three steps on it and return the peak of the memory."""
    import torch

    import pyunlearn
    from pyunlearn import models
    from pyunlearn.cli.demo import FORGET, HOLDOUT, SURVIVE
    from pyunlearn.cli.demo_model import demo_model
    from pyunlearn.models.config import LoadOptions
    from pyunlearn.models.loading import load_options

    if stage == "save":
        if not Path(where).exists():
            network, tokenizer = models.load(model or demo_model(), dtype=getattr(torch, settings["dtype"]))
            for part in (network, tokenizer):
                part.save_pretrained(where)
        return {}
    own = ("lora", "gradient_checkpointing")
    loading = {name: value for name, value in settings.items() if name not in own}
    texts = {"holdout": HOLDOUT.read_text(encoding="utf-8").splitlines(), "retain": list(SURVIVE.values())}
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now the present size
    before = resident("VmRSS")
    with load_options(LoadOptions(**loading)), tempfile.TemporaryDirectory() as out:
        result = pyunlearn.unlearn(
            where,
            list(FORGET.values()),
            **texts,
            max_steps=steps,
            output_dir=Path(out) / "new",
            **{name: settings[name] for name in own if name in settings},
        )
    peak = resident("VmHWM") - before
    assert len(result.history) == steps
    parameters = sum(p.numel() for p in models.load(where)[0].parameters())
    trained = sum(p.numel() for p in result.model.parameters() if p.requires_grad)
    return {"bytes": peak, "parameters": parameters, "trained": trained}


def resident(name: str) -> int:
    """Return a size of this process in bytes: VmRSS at present, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
