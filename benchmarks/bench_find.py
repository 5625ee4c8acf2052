"""Records per second of a search for copies, on one core: 100,000 records of 100 words in a .jsonl file.

Words are drawn as often as those of a language, and every thousandth record contains a text. Seconds are CPU time of
the process, which other load does not stretch; the peak is that of Python's objects, in a second run.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import pyunlearn
from benchmarks.harness import environment, save

_RECORDS, _LENGTH, _TEXT = 100_000, 100, 40
_CASES = {"100 texts": (100, False), "100 texts, accents": (100, True), "10,000 texts": (10_000, False)}


def drawn(count: int, length: int, seed: int, *, accents: bool) -> list[str]:
    """Return texts of random words of two to nine letters; with accents, some are not ASCII."""
    r = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz" + ("é" if accents else "")
    vocabulary = ["".join(r.choices(letters, k=r.randint(2, 9))) for _ in range(20_000)]
    r.seed(seed)
    words = r.choices(vocabulary, [1 / (i + 3) for i in range(20_000)], k=count * length)
    return [" ".join(words[i * length : (i + 1) * length]) for i in range(count)]


def run(options: argparse.Namespace) -> None:
    """Check that every copy is listed, time the search, and print environment and table."""
    results = [_case(name, *case, options.rounds or 3) for name, case in _CASES.items()]
    about = environment("cpu")
    table = Table(title="search for copies, one core", title_justify="left")
    for column in ("texts", "records", "MB", "records/s", "spread", "peak MiB"):
        table.add_column(column, justify="left" if column == "texts" else "right")
    for row in results:
        speeds = [row["records"] / seconds for seconds in row["seconds"]]
        table.add_row(
            row["texts"], f"{row['records']:,}", f"{row['megabytes']:.0f}", f"{statistics.median(speeds):,.0f}",
            f"{min(speeds):,.0f} to {max(speeds):,.0f}", f"{row['peak_mib']:.1f}",
        )  # fmt: skip
    console = Console(width=140)
    console.print(about, highlight=False)
    console.print(table)
    if options.save:
        print(f"saved to {save('find', {'benchmark': 'find', 'environment': about, 'rows': results}, options.out)}")


def _case(name: str, count: int, accents: bool, rounds: int) -> dict[str, Any]:
    texts, records = (
        drawn(n, k, seed, accents=accents) for seed, (n, k) in enumerate([(count, _TEXT), (_RECORDS, _LENGTH)])
    )
    for i in range(0, _RECORDS, 1000):
        records[i] = f"{records[i]} {texts[i // 1000]}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus.jsonl"
        path.write_text(
            "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in records), encoding="utf-8"
        )
        del records
        seconds = []
        for _ in range(rounds):
            began = time.process_time()
            result = pyunlearn.find_copies(texts, path, progress=False)
            seconds.append(time.process_time() - began)
            assert sum(copy.exact for copy in result) == _RECORDS // 1000
        tracemalloc.start()
        pyunlearn.find_copies(texts, path, progress=False)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return {
            "texts": name,
            "records": _RECORDS,
            "megabytes": path.stat().st_size / 1e6,
            "seconds": seconds,
            "peak_mib": peak / 2**20,
        }
