"""Faults at random moments of each command: nothing may be lost, and the result must be the undisturbed run's.

    python -m benchmarks.reliability --moments 100 --commands unlearn,audit,compare,study,edit --seconds 3600

Each command runs once undisturbed on a tiny model. Then it is faulted at random moments: kill -9, SIGTERM, SIGINT once
and twice, a full disk; half of the moments are of the clock, half are file operations. After each fault the same
command is run again (with --resume where it says so), and its files must be those of the undisturbed run: weights bit
for bit, tables and JSON except times, and no other file. A fault is *survived* where the faulted run has that result,
*resumed* where the next run has it, *refused* where the next run has one sentence for an answer and the result is
there. All else is *lost*: a traceback, another result, a file that stays behind, an end without a word. Exit code 1:
something was lost.
"""

from __future__ import annotations

import argparse
import os

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", ACCELERATE_USE_CPU="true", COLUMNS="200", TQDM_DISABLE="1")

import contextlib
import csv
import hashlib
import io
import json
import random
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.faults import FAULTS, Fault, Moment, Outcome, run_forked

DATA = "--forget ../inputs/forget.jsonl --retain ../inputs/retain.jsonl"
HOLDOUT = f"{DATA} --holdout ../inputs/holdout.jsonl"
STUDY = (
    "--corpus-size 150 --vocabulary 120 --examples 2 --doses 1,8 --seeds 3 --non-members 19 --test-examples 12 "
    "--epochs 2 --warmup 2 --steps 4 --kinds id,canary --unlearning-rates 1e-2"
)
COMMANDS = {
    "unlearn": f"unlearn ../inputs/model {HOLDOUT} --max-steps 12 --batch-size 2 --checkpoint-every 1e-9 "
    "--learning-rate 1e-3 --out out --quiet",
    "audit": f"audit ../inputs/model {HOLDOUT} --out out --quiet",
    "compare": f"compare ../inputs/model {HOLDOUT} --methods ga,npo --max-steps 2 --out out --quiet",
    "edit": f"edit ../inputs/model {DATA} --edit prune --out out --quiet",
    "study": f"study --corpus ../inputs/corpus.jsonl {STUDY} --out out --quiet",
    "study-2": f"study --corpus ../inputs/corpus.jsonl {STUDY} --processes 2 --out out --quiet",
}
TIMES = {"seconds", "peak_memory"}
DRAWN = {".svg", ".png", ".pdf", ".html"}  # not the same twice, in the times on them or in the order of elements
_STARTED = 0.01  # seconds until the command has control of signals, which Python's own start handles before
COLUMNS = ("command", "fault", "tried", "survived", "resumed", "refused with a sentence", "lost")


class Expected(NamedTuple):
    """The undisturbed run of a command."""

    outcome: Outcome
    files: dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Parse the options, try the faults and print the table; return 1 where something was lost, else 0."""
    options = _parser().parse_args(arguments)
    names = options.commands.split(",")
    faults = [f for f in FAULTS if not options.faults or f.name in options.faults.split(",")]
    began, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="pyunlearn-reliability-"))
    inputs = run_forked(partial(make_inputs, folder / "inputs"), folder)
    if inputs.code:
        raise SystemExit(f"the inputs could not be made: {inputs.text}")
    program = _imported(folder / "inputs" / "model")
    expected = {name: undisturbed(program, name, folder) for name in names}
    counts: dict[tuple[str, str], Counter[str]] = {(n, f.name): Counter() for n in names for f in faults}
    for number in range(options.moments):
        for (name, which), count in counts.items():
            if time.monotonic() - began > options.seconds:
                break
            fault = next(f for f in faults if f.name == which)
            rng = random.Random(f"{options.seed}-{name}-{which}-{number}")
            moment = _moment(rng, fault, expected[name])
            place = folder / f"{name}-{which.replace(' ', '-')}-{number}"
            end, why = tried(program, name, fault, moment, expected[name], place)
            count[end] += 1
            if end == "lost":
                print(f"lost: {name}, {which}, {moment}: {why} ({place})", file=sys.stderr, flush=True)
            else:
                shutil.rmtree(place)
    rows = [_row(name, which, count) for (name, which), count in counts.items()]
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    print("\n".join("| " + " | ".join(row) + " |" for row in rows))
    lost = sum(count["lost"] for count in counts.values())
    for name in names:
        outcome = expected[name].outcome
        print(f"{name}: {outcome.seconds:.1f} s undisturbed, {outcome.operations} file operations")
    if not lost:
        shutil.rmtree(folder)
    return 1 if lost else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=20, help="moments for each command and fault (default: 20)")
    parser.add_argument("--commands", default=",".join(COMMANDS), help="commands, separated by commas (default: all)")
    parser.add_argument("--faults", help=f"which, separated by commas (default: {','.join(f.name for f in FAULTS)})")
    parser.add_argument("--seconds", type=float, default=3600.0, help="no new fault after this time (default: 3600)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    return parser


def _imported(model: Path) -> Callable[[], None]:
    """Import all that the commands import, and load a model once, so that children need not; return the program."""
    import accelerate  # noqa: F401
    import transformers.models.t5.modeling_t5  # noqa: F401

    with contextlib.suppress(ImportError):  # pages and plots are written where these are installed
        import jinja2  # noqa: F401
        import matplotlib.pyplot  # noqa: F401

    import pyunlearn.comparing
    import pyunlearn.edits.registry
    import pyunlearn.report
    import pyunlearn.study.study
    import pyunlearn.unlearning.api  # noqa: F401
    from pyunlearn.cli.main import main as program
    from pyunlearn.models import load

    load(model)
    return program


def make_inputs(folder: Path) -> None:
    """Train and save a tiny Llama that knows 4 of its texts by heart; write the texts of each role next to it."""
    import torch

    from benchmarks.many_records import facts, train, word_tokenizer
    from pyunlearn.models.from_scratch import untrained_llama

    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = word_tokenizer()
    model = untrained_llama(len(tokenizer), width=32, feed_forward=64, layers=1, heads=2, context=64)
    forget, retain, holdout = facts(4, 1), facts(40, 2), facts(24, 3)
    train(model, tokenizer, retain + forget * 150, learning_rate=1e-2)
    folder.mkdir()
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
    corpus = facts(260, 4)
    for role, rows in {"forget": forget, "retain": retain, "holdout": holdout, "corpus": corpus}.items():
        (folder / f"{role}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def undisturbed(program: Callable[[], None], name: str, folder: Path) -> Expected:
    """Run a command twice without a fault; both must have the same result, or nothing can be told from it."""
    ends = []
    for number in (1, 2):
        place = folder / f"{name}-undisturbed-{number}"
        outcome = _run(program, COMMANDS[name], place)
        if outcome.code not in (0, 1):
            raise SystemExit(f"{name} ends with exit code {outcome.code} without a fault: {outcome.text}")
        ends.append(Expected(outcome, contents(place)))
    if ends[0].files != ends[1].files:
        raise SystemExit(f"{name} gives two results without a fault: {_difference(ends[0].files, ends[1].files)}")
    return ends[1]


def _run(
    program: Callable[[], None], words: str, place: Path, fault: Fault | None = None, moment: Moment | None = None
) -> Outcome:
    place.mkdir(exist_ok=True)

    def work() -> None:
        sys.argv = ["pyunlearn", *words.split()]
        program()

    return run_forked(work, place, fault, moment)


def _moment(rng: random.Random, fault: Fault, expected: Expected) -> Moment:
    """Draw a moment within the undisturbed run."""
    seconds, operations = expected.outcome.seconds, expected.outcome.operations
    by_operation, gap = rng.random() < 1 / 2, rng.choice([0.001, 0.01, 0.1]) * rng.random()
    if by_operation:
        return Moment(operation=rng.randint(1, operations))
    if fault.signals:
        return Moment(seconds=_STARTED + rng.random() * seconds, gap=gap)
    return Moment(bytes=int(2 ** (16 * rng.random())))


def tried(
    program: Callable[[], None], name: str, fault: Fault, moment: Moment, expected: Expected, place: Path
) -> tuple[str, str]:
    """Fault a command once and run it again until it has its result; return how it ended, and why it counts as lost."""
    first = _run(program, COMMANDS[name], place, fault, moment)
    finished = first.code == expected.outcome.code
    silent = first.code < 0 and -first.code in fault.signals  # ended by the signal, as its sender wants
    if reason := _unclear(first, () if finished or silent else (2, 130)):
        return "lost", reason
    if finished:
        difference = _difference(expected.files, contents(place))
        return ("lost", f"exit code {first.code}, and {difference}") if difference else ("survived", "")
    words = COMMANDS[name] + (" --resume" if "--resume" in first.text else "")
    for _ in range(2):
        again = _run(program, words, place)
        if reason := _unclear(again, (2, expected.outcome.code)):
            return "lost", f"run again after {first.text!r}: {reason}"
        difference = _difference(expected.files, contents(place))
        if again.code == expected.outcome.code:
            return ("lost", f"run again: {difference}") if difference else ("resumed", "")
        if "--resume" not in again.text or "--resume" in words:
            return ("lost", f"{again.text!r}, and {difference}") if difference else ("refused", "")
        words += " --resume"
    return "lost", f"it cannot be run again: {again.text!r}"


def _unclear(outcome: Outcome, codes: Sequence[int]) -> str:
    """Return what is wrong with the way in which a process ended, or an empty string; `codes` are allowed, if any."""
    if "Traceback" in outcome.text or "Exception ignored" in outcome.text:
        return f"a traceback: {outcome.text}"
    if codes and outcome.code not in codes:
        return f"exit code {outcome.code}: {outcome.text!r}"
    if outcome.code in (2, 130) and len(outcome.text.split()) < 4:
        return f"exit code {outcome.code} without a sentence: {outcome.text!r}"
    return ""


def contents(place: Path) -> dict[str, Any]:
    """Return path -> content, without times, of every file and folder in a place."""
    return {str(path.relative_to(place)): _content(path) for path in sorted(place.rglob("*"))}


def _content(path: Path) -> Any:
    if path.is_dir() or path.suffix in DRAWN:
        return None
    content = path.read_bytes()
    if path.suffix == ".json":
        with contextlib.suppress(ValueError):  # half-written: as bytes it is no other file's content
            return _timeless(json.loads(content))
    if path.suffix == ".csv":
        return [_timeless(row) for row in csv.DictReader(io.StringIO(content.decode()))]
    if zipfile.is_zipfile(path):  # optimizers; the archive holds the date
        with zipfile.ZipFile(path) as archive:
            return {info.filename.partition("/")[2] or info.filename: info.CRC for info in archive.infolist()}
    return hashlib.sha256(content).hexdigest()


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _timeless(part) for name, part in value.items() if name not in TIMES}
    return [_timeless(part) for part in value] if isinstance(value, list) else value


def _difference(expected: dict[str, Any], there: dict[str, Any]) -> str:
    """Return how the files differ from the expected ones, or an empty string."""
    parts = {
        "missing": expected.keys() - there.keys(),
        "left behind": there.keys() - expected.keys(),
        "different": {name for name in expected.keys() & there.keys() if expected[name] != there[name]},
    }
    return "; ".join(f"{what}: {', '.join(sorted(names))}" for what, names in parts.items() if names)


def _row(name: str, which: str, count: Counter[str]) -> tuple[str, ...]:
    ends = (str(count[end]) for end in ("survived", "resumed", "refused", "lost"))
    return (name, which, str(count.total()), *ends)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.exit(main())
