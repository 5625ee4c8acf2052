"""The whole step: pyunlearn next to the same recipe in a plain transformers.Trainer.

    python -m benchmarks.step --out OUT

One optimizer step and a whole run of gradient ascent, gradient difference, NPO with the retain set's likelihood or
with the divergence from the reference model, and NPO with LoRA, on SmolLM2-135M with 8 forget and 8 retain texts of the
lengths of TOFU (arXiv 2401.06121), of random words. The plain recipe computes all logits and a reference forward in
each step (benchmarks/step_plain.py). Both sides get the same token ids, masks, weights, learning rate and optimizer.

First both prove that they compute the same: the losses and gradient norms of the first steps, and what these change
in the weights. Then the steps are timed in turn, each side in a process of its own, with the products of the trunk and
the head alone as the floor. On one thread of a CPU, times are processor times, so that other programs disturb them
little. Memory is the peak of the resident set (on a GPU, of the allocator) less what the libraries take.

The model is fine-tuned on the forget texts, so that they count as memorized, and saved in OUT, as is each row: the same
command resumes after an interruption.

Precisions: float32; default, each side's own (of the plain recipe bfloat16 autocast, as in open-unlearning); autocast,
bfloat16 autocast on both; bfloat16, bfloat16 weights against autocast.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import environment, save, versions
from benchmarks.step_cases import METHODS, PRECISIONS, Task, prepared
from benchmarks.step_phases import PHASES
from benchmarks.step_sides import child
from benchmarks.tofu import say

SIDES = ("pyunlearn", "plain", "floor")
_LOSS, _CHANGE = 1e-4, 1e-2
"""Largest relative difference of a loss or gradient norm in float32, and of what the first steps change in the weights:
the update is g / |g| at first, so that a gradient near 0 may have either sign."""


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Parse the options, compare and time each method, print a Markdown table, and save the numbers."""
    options = _parser().parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.tiny:
        options.model = "tiny"
    torch.set_num_threads(options.threads)
    folder, rows = prepared(options, options.out)
    about = environment(options.device) | versions("transformers", "accelerate", "peft")
    settings = {
        name: getattr(options, name) for name in ("batch_size", "steps", "run_steps", "forget", "retain", "holdout")
    }
    results: list[dict[str, Any]] = []
    for precision in options.dtype.split(","):
        for method in options.methods.split(","):
            task = Task("", str(folder), rows, method, precision, options.batch_size, options.threads, options.device)
            name = f"step-{folder.name.removeprefix('model-')}-{method}-{precision}-{options.device}.json"
            results.append(_once(options.out / name, {"method": method, "precision": precision, **settings}, task))
            print("\n".join(table(results)[-1:] if len(results) > 1 else table(results)), flush=True)
    lines = [*table(results), "", *phase_table(results)]
    (options.out / "step.md").write_text("\n".join(lines) + "\n")
    print("\n".join(["", *lines]))
    if options.save:
        model = Path(options.model).name if options.model else "SmolLM2-135M"
        print(f"saved to {save('step', {'benchmark': 'step', 'model': model, 'environment': about, 'rows': results})}")
    return results


def _once(path: Path, row: dict[str, Any], task: Task) -> dict[str, Any]:
    """Return a row of the table: from its file, if measured with these settings, or else measured and written."""
    if path.exists():
        earlier: dict[str, Any] = json.loads(path.read_text())
        if row.items() <= earlier.items():
            return earlier
    say(f"{row['method']}, {row['precision']}")
    row |= stepwise(task, row["steps"])
    if row["run_steps"]:
        row |= whole_runs(task._replace(steps=row["run_steps"]))
    path.write_text(json.dumps(row, indent=1) + "\n")
    return row


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the fine-tuned model and the table")
    parser.add_argument("--model", help="another model than SmolLM2-135M: a folder, a name, tiny, or 1b (random)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, for tests")
    parser.add_argument("--data", type=Path, help="TOFU's folder, for its own texts in place of random words")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"default: {','.join(METHODS)}")
    parser.add_argument(
        "--dtype", default="float32,default", help=f"some of {','.join(PRECISIONS)}; default: float32,default"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    for name, number, what in (
        ("threads", 1, "threads of torch"),
        ("batch-size", 8, "forget texts, and retain texts, in a step"),
        ("steps", 5, "timed steps of each side, after one of warm-up; the median counts"),
        ("run-steps", 10, "steps of a whole run; 0: no whole runs"),
        ("forget", 40, "forget texts"),
        ("retain", 40, "retain texts"),
        ("holdout", 40, "texts of the holdout in a whole run"),
    ):
        parser.add_argument(f"--{name}", type=int, default=number, help=f"{what} (default {number})")
    parser.add_argument("--known", type=float, default=3.0, help="nats a token at which forget texts are known")
    parser.add_argument("--fine-tuning-rate", type=float, help="learning rate at which the model learns them")
    parser.add_argument("--save", action="store_true", help="write the results under benchmarks/results")
    return parser


def stepwise(task: Task, steps: int) -> dict[str, Any]:
    """Time steps of each side in turn, after one, and compare the first three; return the numbers of a row."""
    with sides(task) as (connections, before), tempfile.TemporaryDirectory() as scratch:
        saved = {name: Path(scratch) / name for name in ("start", *SIDES[:2])}
        _ask(connections["plain"], str(saved["start"]))
        rounds, compared = [], min(3, steps + 1)
        for number in range(steps + 1):
            rounds.append({side: _ask(connections[side], "time") for side in SIDES})
            if number + 1 == compared:
                for side in SIDES[:2]:
                    _ask(connections[side], str(saved[side]))
                weights = {name: torch.load(path) for name, path in saved.items()}
                first = {side: [r[side] for r in rounds] for side in SIDES[:2]}
                agreement = agreement_of(first, weights)
                if task.precision == "float32":
                    require_agreement(agreement)
        phases = {side: _ask(connections[side], "phases")["phases"] for side in SIDES[:2]}
    rounds = rounds[1:]
    seconds = {side: [r[side]["seconds"] for r in rounds] for side in SIDES}
    middle = {side: statistics.median(values) for side, values in seconds.items()}
    return {
        "agreement": agreement,
        "seconds": middle,
        "spread": {side: [min(values), max(values)] for side, values in seconds.items()},
        "faster": statistics.median(b / a for a, b in zip(seconds["pyunlearn"], seconds["plain"], strict=True)),
        "of_floor": {
            side: statistics.median(a / b for a, b in zip(seconds[side], seconds["floor"], strict=True))
            for side in SIDES[:2]
        },
        "peak": {side: rounds[-1][side]["peak"] - before[side] for side in SIDES[:2]},
        "phases": phases,
    }


@contextmanager
def sides(task: Task) -> Iterator[tuple[dict[str, Any], dict[str, int]]]:
    """Start the sides; yield a connection to each, and the memory of the first two before their model was loaded."""
    processes, connections = [], {}
    try:
        for side in SIDES:
            connections[side], process = started(task._replace(side=side))
            processes.append(process)
        ready = {side: connection.recv() for side, connection in connections.items()}
        yield connections, {side: int(ready[side].get("before", 0)) for side in SIDES}
        for connection in connections.values():
            connection.send(None)
        for process in processes:
            process.join(60)
    finally:
        for process in processes:
            process.kill()


def started(task: Task) -> tuple[Any, Any]:
    """Start a side in a process of its own; return a connection to it, and the process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.step_sides"])  # the libraries are loaded once
    own, theirs = context.Pipe()
    process = context.Process(target=child, args=(theirs, task), daemon=True)
    process.start()
    theirs.close()  # so that its end is seen here
    return own, process


def _ask(connection: Any, message: Any) -> dict[str, Any]:
    """Send a message to a side and return its answer. Raises EOFError where it has ended."""
    connection.send(message)
    answer: dict[str, Any] = connection.recv()
    return answer


def agreement_of(first: dict[str, list[dict[str, Any]]], weights: dict[str, dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Return by how much the sides differ, relatively: losses, gradient norms, what the steps changed in weights."""

    def difference(name: str) -> float:
        pairs = zip(first["pyunlearn"], first["plain"], strict=True)
        return max(abs(a[name] - b[name]) / max(abs(b[name]), 1e-12) for a, b in pairs)

    apart = changed = 0.0
    for name, start in weights["start"].items():
        own, plain = weights["pyunlearn"][name].double(), weights["plain"][name].double()
        apart += float((own - plain).square().sum())
        changed += float((plain - start.double()).square().sum())
    return {
        "losses": {side: [r["loss"] for r in first[side]] for side in first},
        "loss": difference("loss"),
        "gradient_norm": difference("gradient_norm"),
        "change": (apart / changed) ** 0.5,
    }


def require_agreement(agreement: dict[str, Any]) -> None:
    """Exit with one sentence where the sides do not compute the same."""
    if max(agreement["loss"], agreement["gradient_norm"]) > _LOSS or agreement["change"] > _CHANGE:
        raise SystemExit(f"the two sides do not compute the same, so that their times cannot be compared: {agreement}")


def whole_runs(task: Task) -> dict[str, Any]:
    """Run each side once from the loaded model to its end, one after the other, each in a process of its own."""
    runs = {}
    for side in SIDES[:2]:
        connection, process = started(task._replace(side=side))
        try:
            run = connection.recv()
        finally:
            process.join(60)
            process.kill()
        runs[side] = run | {"peak": run["peak"] - run["before"]}
    return {"run": runs}


_COLUMNS = (
    "method", "precision", "pyunlearn, s", "plain, s", "faster", "of the floor: pyunlearn, plain",
    "peak MiB: pyunlearn, plain", "run of pyunlearn, s (outside steps)", "run of plain, s",
)  # fmt: skip


def table(results: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table of the steps and runs."""
    lines = [f"| {' | '.join(_COLUMNS)} |", "|" + "---|" * len(_COLUMNS)]
    for row in results:
        seconds, floor, peak, run = row["seconds"], row["of_floor"], row["peak"], row.get("run")
        cells = [f"{row['method']}", row["precision"], *(f"{seconds[side]:.3g}" for side in SIDES[:2])]
        cells += [f"{row['faster']:.2f}", f"{floor['pyunlearn']:.2f}, {floor['plain']:.2f}"]
        cells.append(", ".join(f"{peak[side] / 2**20:.0f}" for side in SIDES[:2]))
        if run is None:
            cells += ["-", "-"]
        else:
            own = run["pyunlearn"]
            cells.append(f"{own['seconds']:.3g} ({own['outside'] / own['seconds']:.0%}, {own['steps']} steps)")
            cells.append(f"{run['plain']['seconds']:.3g}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def phase_table(results: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table of where the time of a step goes, in per cent."""
    lines = [f"| method | precision | side | {' | '.join(PHASES)} |", "|" + "---|" * (3 + len(PHASES))]
    for row in results:
        for side, phases in row["phases"].items():
            total = sum(phases.values())
            shares = [f"{seconds / total:.0%}" for seconds in phases.values()]
            lines.append(f"| {' | '.join([row['method'], row['precision'], side, *shares])} |")
    return lines


if __name__ == "__main__":
    main()
