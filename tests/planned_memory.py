"""Measure the peak memory of a run and plan it: `python planned_memory.py FOLDER DTYPE OPTIONS` prints both, bytes."""

import gc
import json
import random
import sys
from pathlib import Path

import torch

import pyunlearn
from pyunlearn.models.config import LoadOptions
from pyunlearn.models.from_scratch import train_tokenizer, untrained_llama
from pyunlearn.models.loading import load_options

WORDS = [f"{a}{b}" for a in "bdfgklmnprst" for b in ("an", "el", "ir", "os", "um")]


def texts(seed, words, count, length):
    """Return texts of random words."""
    r = random.Random(seed)
    return [" ".join(r.choice(words) for _ in range(length)) for _ in range(count)]


def save(network, tokenizer, where):
    """Save a model and its tokenizer, and return where."""
    network.save_pretrained(where)
    tokenizer.save_pretrained(where)
    return where


def status(name):
    """Return a number of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def main(folder, dtype, options):
    """Print {"peak": ..., "planned": ...}."""
    sets = {
        "forget": texts(0, WORDS[:20], 3, 160),
        "retain": texts(1, WORDS[20:], 4, 180),
        "holdout": texts(2, WORDS[20:], 19, 40),
    }
    tokenizer = train_tokenizer(WORDS, 2000)
    torch.manual_seed(0)
    size = {"width": 512, "feed_forward": 1408, "layers": 8, "heads": 8, "context": 512}
    network = untrained_llama(16_384, **size)
    with torch.no_grad():  # words that follow each other, so that the forget texts count as memorized
        own = tokenizer.convert_tokens_to_ids([f"▁{word}" for word in WORDS[:20]])
        network.get_input_embeddings().weight[own] += 0.1 * torch.randn(512)
    where = save(network.to(getattr(torch, dtype)), tokenizer, folder / "model")
    tiny = size | {"width": 32, "feed_forward": 64, "layers": 1, "heads": 2}
    small = save(untrained_llama(2_000, **tiny).to(getattr(torch, dtype)), tokenizer, folder / "tiny")
    del network
    with load_options(LoadOptions(dtype=dtype)):
        pyunlearn.unlearn(small, **sets, max_steps=1, output_dir=folder / "first", **options)  # loads all libraries
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now the present size
        before = status("VmRSS")
        result = pyunlearn.unlearn(where, **sets, max_steps=2, output_dir=folder / "new", **options)
        peak = status("VmHWM") - before
        planned = pyunlearn.plan(where, **sets, output_dir=folder / "new", **options).memory.device
    assert len(result.history) == 2
    print(json.dumps({"peak": peak, "planned": planned}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
