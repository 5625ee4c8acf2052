"""Memory of an unlearning run, in bytes a parameter: full float32 and bfloat16, LoRA, and LoRA on 4-bit weights.

    python -m benchmarks.memory

A new process for each configuration loads SmolLM2-135M (or `--model`), saved in the configuration's dtype, and takes
three optimizer steps of `pyunlearn.unlearn` on the demo's texts, with the output folder that makes it store a
checkpoint. Its peak resident set, less what it was after a step on a tiny model, with which all libraries are loaded,
is divided by the number of parameters; so it includes activations, logits and what scoring needs. "planned" is the sum
of `pyunlearn.plan`, and its difference from the peak. Linux only.

`--model random` is a Llama of 290 million random weights, `--model random-1b` one of 1.1 billion, with texts of 120 to
210 tokens.

    python -m benchmarks.memory --records 20000,60000

measures bytes a record instead: runs of two optimizer steps on a Llama of a few thousand weights and records of about
50 tokens in files, a new process for each number of records. The slope between the smallest and the largest number is
the table; "objects" are Python's (tracemalloc, with `--objects`, slow).
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import subprocess
import sys
import tempfile
import time
import tracemalloc
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

RANDOM: dict[str, dict[str, int]] = {
    "random": {"width": 1024, "feed_forward": 2816, "layers": 20, "heads": 16},
    "random-1b": {"width": 2048, "feed_forward": 8192, "layers": 16, "heads": 32},
}
"""Shapes of models with random weights."""

RECORDS: dict[str, dict[str, int | None]] = {
    "forget set": {"forget": None, "holdout": 200},
    "forget set, with a retain set of 1,000": {"forget": None, "retain": 1000, "holdout": 200},
    "forget set, without other texts": {"forget": None},
    "retain set": {"forget": 100, "retain": None, "holdout": 200},
}
"""Texts by role of a run on n records, None for n."""


def main() -> None:
    """Parse the options, measure each configuration in a process of its own, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="not SmolLM2-135M: a folder, a name, random or random-1b")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps (default 3)")
    parser.add_argument("--configurations", nargs="+", default=list(CONFIGURATIONS), help="names (default: all)")
    parser.add_argument("--records", default=None, help="numbers of records, separated by commas: bytes a record")
    parser.add_argument("--sets", nargs="+", default=list(RECORDS), help="with --records: names (default: all)")
    parser.add_argument("--objects", action="store_true", help="with --records: count Python's objects too")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        task = json.loads(options.child)
        print(json.dumps(measured_records(**task) if "counts" in task else measured(**task)))
        return
    if options.records:
        by_record([int(n) for n in options.records.split(",")], options.sets, objects=options.objects)
        return
    print("| configuration | trained parameters | peak, MB | bytes a parameter | planned, MB | |", flush=True)
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.configurations:
            settings = dict(CONFIGURATIONS[name])
            where = Path(temporary) / settings["dtype"]
            task = {"model": options.model, "where": str(where), "steps": options.steps, "settings": settings}
            child(task | {"stage": "save"})
            row = child(task | {"stage": "measure"})
            size = row["bytes"] / row["parameters"]
            cells = [name, f"{row['trained']:,}", f"{row['bytes'] / 1e6:,.0f}", f"{size:.1f}"]
            cells += [f"{row['planned'] / 1e6:,.0f}", f"{row['planned'] / row['bytes'] - 1:+.0%}"]
            print(f"| {' | '.join(cells)} |", flush=True)


def child(task: dict[str, Any]) -> dict[str, Any]:
    """Return what a new process measures."""
    words = [sys.executable, "-m", "benchmarks.memory", "--child", json.dumps(task)]
    out = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    row: dict[str, Any] = json.loads(out.splitlines()[-1])
    return row


def by_record(numbers: list[int], sets: list[str], *, objects: bool) -> None:
    """Print a Markdown table of the bytes that one more record takes, and of the CPU seconds of the largest run."""
    columns = ["peak, bytes a record", "at the end", *(["objects, peak", "at the end"] if objects else [])]
    print(f"| set | {' | '.join(columns)} | s for {numbers[-1]:,} |\n|{'---|' * (len(columns) + 2)}", flush=True)
    for name in sets:
        task, cells = {"counts": RECORDS[name], "traced": False}, []
        few, many = (child(task | {"n": n}) for n in (numbers[0], numbers[-1]))
        seconds = many.pop("seconds")
        if objects:
            few, many = (
                row | child(task | {"n": n, "traced": True}) for row, n in ((few, numbers[0]), (many, numbers[-1]))
            )
        cells = [f"{(many[key] - few[key]) / (numbers[-1] - numbers[0]):,.0f}" for key in many]
        print(f"| {' | '.join([name, *cells])} | {seconds:.0f} |", flush=True)


def measured_records(counts: dict[str, int | None], n: int, *, traced: bool) -> dict[str, float]:
    """Return bytes beyond those of a run on few records, and CPU seconds, of a run on n records; None stands for n."""
    import torch

    import pyunlearn
    from pyunlearn.models.from_scratch import train_tokenizer, untrained_llama

    torch.manual_seed(0)
    words = [word for text in demo_texts()["holdout"] for word in text.split()]
    tokenizer = train_tokenizer(demo_texts()["holdout"], 1000)
    with tempfile.TemporaryDirectory() as place:

        def run(out: str, size: int) -> tuple[Any, float]:
            sizes = {role: size if m is None else m for role, m in counts.items()}
            texts = {role: write_records(Path(place) / f"{role}.jsonl", words, m, role) for role, m in sizes.items()}
            model = untrained_llama(len(tokenizer), width=16, feed_forward=16, layers=1, heads=2, context=256)
            began, settings = time.process_time(), {"max_steps": 2, "output_dir": Path(place) / out}
            result = pyunlearn.unlearn(model, **texts, tokenizer=tokenizer, progress=False, **settings)
            return result, time.process_time() - began

        run("first", 200)
        gc.collect()
        if traced:
            tracemalloc.start()
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        result, seconds = run("new", n)
        gc.collect()
        assert result.examples
        if traced:
            end, peak = tracemalloc.get_traced_memory()
            return {"objects peak": peak, "objects end": end}
        return {"peak": resident("VmHWM") - before, "end": resident("VmRSS") - before, "seconds": seconds}


def write_records(path: Path, words: list[str], count: int, role: str) -> Path:
    """Write records of 30 random words, drawn as often as they are in English; no two are alike."""
    r = random.Random(role)
    with path.open("w") as file:
        for _ in range(count):
            file.write(json.dumps({"text": " ".join(r.choices(words, k=30))}) + "\n")
    return path


def measured(model: str | None, where: str, steps: int, settings: dict[str, Any], stage: str) -> dict[str, Any]:
    """Save the model in a dtype, or run three steps on it and return the peak of the memory."""
    import torch

    import pyunlearn
    from pyunlearn import models
    from pyunlearn.models.config import LoadOptions
    from pyunlearn.models.loading import load_options

    if stage == "save":
        if not Path(where).exists():
            save(model, where, getattr(torch, settings["dtype"]))
        return {}
    own = ("lora", "gradient_checkpointing")
    loading = LoadOptions(**{name: value for name, value in settings.items() if name not in own})
    config = {name: settings[name] for name in own if name in settings}
    texts = random_texts() if model in RANDOM else demo_texts()
    with load_options(loading), tempfile.TemporaryDirectory() as out:
        tiny = Path(out) / "tiny"
        save_tiny(where, tiny, getattr(torch, settings["dtype"]))
        pyunlearn.unlearn(tiny, **texts, max_steps=1, output_dir=Path(out) / "first", **config)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now the present size
        before = resident("VmRSS")
        result = pyunlearn.unlearn(where, **texts, max_steps=steps, output_dir=Path(out) / "new", **config)
        peak = resident("VmHWM") - before
        assert len(result.history) == steps
        planned = pyunlearn.plan(where, **texts, output_dir=Path(out) / "new", **config)
    trained = sum(p.numel() for p in result.model.parameters() if p.requires_grad)
    parameters = sum(p.numel() for p in models.load(where)[0].parameters())
    return {"bytes": peak, "parameters": parameters, "trained": trained, "planned": planned.memory.device}


def demo_texts() -> dict[str, list[str]]:
    """Return the texts of the demo."""
    from pyunlearn.cli.demo import FORGET, HOLDOUT, SURVIVE

    holdout = HOLDOUT.read_text(encoding="utf-8").splitlines()
    return {"forget": list(FORGET.values()), "retain": list(SURVIVE.values()), "holdout": holdout}


def random_texts() -> dict[str, list[str]]:
    """Return texts of random words; those of the forget set share none with the others."""
    words = sorted({word for text in demo_texts()["holdout"] for word in text.split() if word.isalpha()})
    forget, others = words[::6], [word for i, word in enumerate(words) if i % 6]

    def texts(seed: int, own: list[str], lengths: list[int]) -> list[str]:
        r = random.Random(seed)
        return [" ".join(r.choice(own) for _ in range(length)) for length in lengths]

    lengths = {"forget": [160] * 3, "retain": [120, 150, 180, 210], "holdout": [40] * 19}
    return {role: texts(i, forget if role == "forget" else others, n) for i, (role, n) in enumerate(lengths.items())}


def save(model: str | None, where: str, dtype: Any) -> None:
    """Save the model and its tokenizer in a dtype."""
    import torch

    from pyunlearn import models
    from pyunlearn.cli.demo_model import demo_model
    from pyunlearn.models.from_scratch import train_tokenizer, untrained_llama

    if model not in RANDOM:
        network, tokenizer = models.load(model or demo_model(), dtype=dtype)
    else:
        texts = random_texts()
        tokenizer = train_tokenizer(demo_texts()["holdout"], 2000)
        torch.manual_seed(0)
        network = untrained_llama(32_768, context=2048, **RANDOM[model])
        ids = {role: {i for text in each for i in tokenizer(text).input_ids} for role, each in texts.items()}
        own = sorted(ids["forget"] - ids["retain"] - ids["holdout"])
        with torch.no_grad():  # words that follow each other: the forget texts count as memorized
            network.get_input_embeddings().weight[own] += 0.1 * torch.randn(network.config.hidden_size)
        network.to(dtype)
    for part in (network, tokenizer):
        part.save_pretrained(where)


def save_tiny(where: str, tiny: Path, dtype: Any) -> None:
    """Save a tiny model with the tokenizer of another."""
    from pyunlearn.models.from_scratch import untrained_llama
    from pyunlearn.models.loading import load_tokenizer

    tokenizer = load_tokenizer(where)
    network = untrained_llama(len(tokenizer), width=32, feed_forward=64, layers=1, heads=2, context=512)
    for part in (network.to(dtype), tokenizer):
        part.save_pretrained(tiny)


def resident(name: str) -> int:
    """Return a size of this process in bytes: VmRSS at present, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
