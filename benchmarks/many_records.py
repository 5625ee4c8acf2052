"""Requests of one to many records at the defaults: what is settled, at how many visits a record, and at what cost.

    python -m benchmarks.many_records --counts 1,2,5,16,64 --given retain+holdout,holdout,retain,nothing

For each count a tiny Llama is trained on that many random facts sixty times and on others once (six thousand, or 32 for
each that is known, if that is more), so that it knows the first by heart and of the others the form alone: nothing in a
fact can be guessed from its prompt. Then `pyunlearn.unlearn` forgets them with its defaults. The retain set is 400 (or
the count) of the facts that were read once, or, with --known, as many that were read sixty times too; the holdout is
200 facts that were never read.
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
from pyunlearn.models import Likelihood
from pyunlearn.models.from_scratch import untrained_llama

WORDS = [c + v + end for c in "bdkl" for v in "aeiou" for end in ("ba", "de", "ki", "lo", "mu")]
ONCE, ONCE_EACH, READ_OFTEN, RETAIN, HOLDOUT = 6000, 32, 60, 400, 200
COLUMNS = ("records", "given", "forgotten", "over-unlearned", "ended with", "visits a record", "s a record", "utility")


def main(arguments: list[str] | None = None) -> list[tuple[str, ...]]:
    """Parse the options, train and unlearn for each count, print the table; return its rows."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows = []
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS), flush=True)
    for count in map(int, options.counts.split(",")):
        model, tokenizer, texts = world(count, known=options.known, seed=options.seed)
        weights = {name: p.clone() for name, p in model.state_dict().items()}
        for given in options.given.split(","):
            model.load_state_dict(weights)
            rows.append(measured(model, tokenizer, texts, given, options))
            print("| " + " | ".join(rows[-1]) + " |", flush=True)
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", default="1,2,5,16,64,192,1024", help="numbers of records, separated by commas")
    parser.add_argument(
        "--given", default="retain+holdout", help="other sets than the forget set, joined by +, or nothing"
    )
    parser.add_argument("--method", default="auto", help="method (default: auto)")
    parser.add_argument("--plain", action="store_true", help="a record is one text, without a prompt")
    parser.add_argument("--known", action="store_true", help="the retain set is known by heart too")
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


def world(count: int, *, known: bool, seed: int) -> tuple[Any, Any, dict[str, list[dict[str, str]]]]:
    """Return a model that knows `count` facts by heart, its tokenizer, and the texts by role."""
    torch.manual_seed(seed)
    tokenizer = word_tokenizer()
    model = untrained_llama(len(tokenizer), width=128, feed_forward=256, layers=2, heads=4, context=64)
    sizes = {1: count, 2: max(ONCE, ONCE_EACH * count), 4: max(count, 64)}
    forget, once, often = (facts(n, 10 * seed + i) for i, n in sizes.items())
    train(model, tokenizer, once + (forget + (often if known else [])) * READ_OFTEN)
    return (
        model,
        tokenizer,
        {
            "forget": forget,
            "retain": often if known else once[: max(RETAIN, count)],
            "holdout": facts(HOLDOUT, 10 * seed + 3),
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
    roles = [] if given == "nothing" else given.split("+")
    rows: dict[str, Any] = {
        role: [r["prompt"] + r["completion"] for r in texts[role]] if options.plain else texts[role]
        for role in ("forget", *roles)
    }
    began = time.perf_counter()
    result = pyunlearn.unlearn(
        model, rows.pop("forget"), tokenizer=tokenizer, method=options.method, seed=options.seed, progress=False, **rows
    )
    seconds, count = time.perf_counter() - began, len(result.examples)
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


if __name__ == "__main__":
    main()
