"""Requests of one to many records at the defaults: what is settled, at how many visits a record, and at what cost.

    python -m benchmarks.many_records --counts 1,2,5,16,64 --given retain+holdout,holdout,retain,nothing
    python -m benchmarks.many_records --counts 40 --retain 80 --methods match,ga,npo --seeds 3

For each count a tiny Llama is trained on that many random facts sixty times and on others once (six thousand, or 32 for
each that is known, if that is more), so that it knows the first by heart and of the others the form alone: nothing in a
fact can be guessed from its prompt. Then `pyunlearn.unlearn` forgets them with its defaults. The retain set is 400 (or
the count) of the facts that were read once, or, with --known, as many that were read sixty times too; the holdout is
200 facts that were never read.

With --methods the table has a row for each method, the mean and the range over the seeds; dpo's winners and the
refusals of idk, idkdpo and flat are answers of the same form that were never read.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import pyunlearn
from pyunlearn.data import batches, encode, read_examples
from pyunlearn.methods.registry import METHODS, SYNONYMS
from pyunlearn.models import Likelihood
from pyunlearn.models.from_scratch import untrained_llama

WORDS = [c + v + end for c in "bdkl" for v in "aeiou" for end in ("ba", "de", "ki", "lo", "mu")]
ONCE, ONCE_EACH, READ_OFTEN, RETAIN, HOLDOUT = 6000, 32, 60, 400, 200
OF_METHODS = ("method", "settled", "over-unlearned", "steps", "utility", "holdout", "ended with")
COLUMNS = ("records", "given", "forgotten", "over-unlearned", "ended with", "visits a record", "s a record", "utility")


def main(arguments: list[str] | None = None) -> list[tuple[str, ...]]:
    """Parse the options, train and unlearn for each count, print the table; return its rows."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    return compared(options) if options.methods else counted(options)


def counted(options: argparse.Namespace) -> list[tuple[str, ...]]:
    """Return and print a row for each number of records and what is given with them."""
    rows = []
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS), flush=True)
    for count in map(int, options.counts.split(",")):
        model, tokenizer, texts = world(
            count, known=options.known, seed=options.seed, retain=options.retain, read_once=options.once
        )
        weights = {name: p.clone() for name, p in model.state_dict().items()}
        for given in options.given.split(","):
            model.load_state_dict(weights)
            rows.append(measured(model, tokenizer, texts, given, options))
            print("| " + " | ".join(rows[-1]) + " |", flush=True)
    return rows


def compared(options: argparse.Namespace) -> list[tuple[str, ...]]:
    """Return and print a row for each method, over the seeds, with the first of the numbers of records."""
    names, results = options.methods.split(","), []
    for seed in range(options.seed, options.seed + options.seeds):
        count = int(options.counts.split(",")[0])
        model, tokenizer, texts = world(
            count, known=options.known, seed=seed, retain=options.retain, read_once=options.once
        )
        weights = {name: p.clone() for name, p in model.state_dict().items()}
        for name in names:
            model.load_state_dict(weights)
            results.append(
                (name, *unlearned(model, tokenizer, texts, options.given.split(",")[0], options, name, seed))
            )
    rows = [row_of(name, [result for other, result, _ in results if other == name]) for name in names]
    print_table(OF_METHODS, rows)
    return rows


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table."""
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


def row_of(name: str, results: list[Any]) -> tuple[str, ...]:
    """Return a method's row of the table, from its results with several seeds."""
    verdicts = [Counter(e.verdict for e in r.examples) for r in results]
    endings = Counter(r.stopped for r in results)
    of_holdout = [r.utility.holdout_rise for r in results if r.utility.holdout_rise is not None]
    return (
        f"`{name}`",
        spread([v["forgotten"] + v["no likelier"] for v in verdicts], "{:.0f}"),
        spread([v["over-unlearned"] for v in verdicts], "{:.0f}"),
        spread([len(r.history) for r in results], "{:.0f}"),
        spread([r.utility.relative_rise for r in results], "{:+.1%}"),
        spread(of_holdout, "{:+.1%}") if of_holdout else "-",
        ", ".join(f"{n} {ending}" if len(endings) > 1 else ending for ending, n in endings.most_common()),
    )


def spread(values: Sequence[float], form: str) -> str:
    """Return the mean and the range of some numbers, or the one number.

    >>> spread([38, 40, 39], "{:.0f}")
    '39 (38 to 40)'
    """
    mean, low, high = (form.format(x) for x in (sum(values) / len(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", default="1,2,5,16,64,192,1024", help="numbers of records, separated by commas")
    parser.add_argument(
        "--given", default="retain+holdout", help="other sets than the forget set, joined by +, or nothing"
    )
    parser.add_argument("--method", default="auto", help="method (default: auto)")
    parser.add_argument("--methods", help="methods to compare, separated by commas: a row each")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds with --methods")
    parser.add_argument("--retain", type=int, help="size of the retain set (default: see above)")
    parser.add_argument("--plain", action="store_true", help="a record is one text, without a prompt")
    parser.add_argument("--known", action="store_true", help="the retain set is known by heart too")
    parser.add_argument("--once", type=int, help="number of facts that were read once (default: see above)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the facts and of the run")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    return parser


def facts(count: int, seed: int) -> list[dict[str, str]]:
    """Return random facts of eight words."""
    r = random.Random(seed)
    return [
        {
            "prompt": f"the {r.choice(WORDS)} {r.choice(WORDS)} of {r.choice(WORDS)}",
            "completion": " " + " ".join(r.choice(WORDS) for _ in range(8)) + " .",
        }
        for _ in range(count)
    ]


def word_tokenizer() -> Any:
    """Return a tokenizer whose tokens are the words of the facts."""
    names = ["<pad>", "<s>", "the", "of", ".", *WORDS]
    raw = Tokenizer(WordLevel({word: i for i, word in enumerate(names)}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="<s>", pad_token="<pad>")


def world(
    count: int, *, known: bool, seed: int, retain: int | None = None, read_once: int | None = None
) -> tuple[Any, Any, dict[str, list[dict[str, str]]]]:
    """Return a model that knows `count` facts by heart, its tokenizer, and the texts by role."""
    torch.manual_seed(seed)
    tokenizer = word_tokenizer()
    model = untrained_llama(len(tokenizer), width=128, feed_forward=256, layers=2, heads=4, context=64)
    sizes = {1: count, 2: read_once or max(ONCE, ONCE_EACH * count), 4: max(count, 64)}
    forget, once, often = (facts(n, 10 * seed + i) for i, n in sizes.items())
    train(model, tokenizer, once + (forget + (often if known else [])) * READ_OFTEN)
    return (
        model,
        tokenizer,
        {
            "forget": forget,
            "retain": (often if known else once[: max(RETAIN, count)])[:retain],
            "holdout": facts(HOLDOUT, 10 * seed + 3),
            "other": facts(count, 10 * seed + 5),
        },
    )


def train(model: Any, tokenizer: Any, rows: Sequence[dict[str, str]], learning_rate: float = 2e-3) -> None:
    """Train on the rows in one shuffled epoch, in batches of 32."""
    tokens = encode(read_examples(list(rows), role="training"), tokenizer, role="training", max_length=None)
    random.Random(0).shuffle(tokens)
    optimizer, likelihood = torch.optim.AdamW(model.parameters(), lr=learning_rate), Likelihood(model)
    steps = -(-len(tokens) // 32)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 * (1 - step / steps)))
    for at in range(0, len(tokens), 32):
        ((_, batch),) = batches(tokens[at : at + 32], 32, pad_id=0)
        optimizer.zero_grad()
        (-likelihood(batch).mean()).backward()
        optimizer.step()
        schedule.step()
    model.eval()


def measured(
    model: Any, tokenizer: Any, texts: dict[str, list[dict[str, str]]], given: str, options: argparse.Namespace
) -> tuple[str, ...]:
    """Unlearn once; return the row of the table."""
    result, seconds = unlearned(model, tokenizer, texts, given, options, options.method, options.seed)
    count = len(result.examples)
    verdicts = Counter(e.verdict for e in result.examples)
    memorized, rise = count - verdicts["not memorized"], result.utility.relative_rise
    return (
        str(count),
        given.replace("+", ", "),
        f"{verdicts['forgotten'] + verdicts['no likelier']} of {memorized}",
        str(verdicts["over-unlearned"]),
        result.stopped,
        f"{sum(e.steps for e in result.examples) / count:.0f}",
        f"{seconds / count:.2f}",
        f"{rise:+.1%}",
    )


def unlearned(
    model: Any,
    tokenizer: Any,
    texts: dict[str, list[dict[str, str]]],
    given: str,
    options: argparse.Namespace,
    method: str,
    seed: int,
) -> tuple[Any, float]:
    """Unlearn once; return the result and the seconds that it took."""
    roles = [] if given == "nothing" else given.split("+")
    rows: dict[str, Any] = {
        role: [r["prompt"] + r["completion"] for r in texts[role]] if options.plain else texts[role]
        for role in ("forget", *roles)
    }
    answers, needs = [r["completion"] for r in texts["other"]], METHODS[SYNONYMS.get(method, method)].needs
    own = {"winners": answers, "refusals": answers[:3]}
    began = time.process_time()  # of one thread; other processes of the machine do not change it
    result = pyunlearn.unlearn(
        model,
        rows.pop("forget"),
        tokenizer=tokenizer,
        method=method,
        method_options={name: values for name, values in own.items() if name in needs},
        seed=seed,
        progress=False,
        **rows,
    )
    return result, time.process_time() - began


if __name__ == "__main__":
    main()
