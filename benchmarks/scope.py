"""What is left in other words after a run: `scope="record"` next to `scope="person"`, on tiny models.

    python -m benchmarks.scope --seeds 3
    python -m benchmarks.scope --seeds 3 --forms paraphrases

For each seed a tiny Llama reads `--records` random facts forty times in each of several wordings, and thousands of
others once in one of them. With `--forms rules` these are the question, another order of its words, and reported
speech: the records have no paraphrases, so the forms are the rewrites by rule. With `--forms paraphrases` they are the
question, and another question with the halves of the answer in the other order, which comes as the records'
paraphrase. `pyunlearn.unlearn` then forgets the records with its defaults, and `pyunlearn.attack` looks for them in
other words. Means over the seeds, with the range where they differ.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import pyunlearn
from benchmarks.many_records import WORDS, print_table, spread, train
from pyunlearn.models.from_scratch import untrained_llama

Row = dict[str, Any]
ONCE, READ_OFTEN, RETAIN, HOLDOUT = 6000, 40, 400, 200
COLUMNS = (
    "scope", "records forgotten", "forms memorized before", "come back in other words", "largest set", "steps",
    "seconds", "utility",
)  # fmt: skip
_OTHERS = 'the of . , : ; " Asked expert said The missing words are ____ which is it ?'


def main(arguments: list[str] | None = None) -> list[tuple[str, ...]]:
    """Parse the options, train, unlearn and attack, print the table; return its rows."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    results: dict[str, list[tuple[float, ...]]] = {}
    for seed in range(options.seeds):
        model, tokenizer, texts = world(options.records, options.forms, seed)
        for scope in ("before", "record", "person"):
            results.setdefault(scope, []).append(_measured(model, tokenizer, texts, scope, seed))
    rows = [(scope, *_cells(values)) for scope, values in results.items()]
    print_table(COLUMNS, rows)
    return rows


def world(count: int, forms: str, seed: int) -> tuple[Any, Any, dict[str, list[Row]]]:
    """Return a model that knows `count` facts in several wordings, its tokenizer, and the records by role."""
    torch.manual_seed(seed)
    names = ["<pad>", "<s>", *_OTHERS.split(), *WORDS, *(word.capitalize() for word in WORDS)]
    raw = Tokenizer(WordLevel({word: i for i, word in enumerate(names)}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="<s>", pad_token="<pad>")
    model = untrained_llama(len(tokenizer), width=128, feed_forward=256, layers=2, heads=4, context=64)
    r = random.Random(seed)
    known, once, holdout = ([_fact(r, forms) for _ in range(n)] for n in (count, ONCE, HOLDOUT))
    train(model, tokenizer, [r.choice(x) for x in once] + [wording for x in known for wording in x] * READ_OFTEN)
    roles = {"forget": known, "retain": once[:RETAIN], "holdout": holdout}
    with_paraphrases = forms == "paraphrases"
    return (
        model,
        tokenizer,
        {
            role: [x[0] | ({"paraphrases": [x[1]]} if with_paraphrases else {}) for x in each]
            for role, each in roles.items()
        },
    )


def _fact(r: random.Random, forms: str) -> list[Row]:
    """Return a random fact in its wordings, the record first."""
    a, b, c = (r.choice(WORDS) for _ in range(3))
    words = [r.choice(WORDS[12 * i : 12 * i + 6]) for i in range(8)]  # unseen answers have likely words too
    answer = " ".join(words) + " ."
    record = {"prompt": f"the {a} {b} of {c}", "completion": f" {answer}"}
    if forms == "paraphrases":
        turned = " ".join(words[4:] + words[:4])
        return [record, {"prompt": f"which {b} is {a} , {c} ?", "completion": f" {turned} ."}]
    return [
        record,
        {"prompt": f"{c} , {b} , {a} :", "completion": f" {answer}"},
        {"prompt": f'it is said of the {a} {b} of {c} : "', "completion": f" {answer}"},
    ]


def _measured(model: Any, tokenizer: Any, texts: dict[str, list[Row]], scope: str, seed: int) -> tuple[float, ...]:
    """Unlearn and attack; return the numbers of a row."""
    trained, result, began = copy.deepcopy(model), None, time.process_time()
    if scope != "before":
        result = pyunlearn.unlearn(trained, tokenizer=tokenizer, scope=scope, seed=seed, progress=False, **texts)
    seconds = time.process_time() - began
    attack = pyunlearn.attack(
        trained, **texts, original=model, tokenizer=tokenizer, attacks=["paraphrase"], progress=False
    )
    left = sum(e.verdict in ("comes back", "still exposed", "doubtful") for e in attack.examples)
    most = max((trial.returned for trial in attack.trials[1:]), default=0)
    if result is None:
        return 0, 0, left, most, 0, 0, 0
    own = [e for e in result.examples if not e.form]
    forms = sum(bool(e.form) and e.verdict != "not memorized" for e in result.examples)
    forgotten = sum(e.verdict == "forgotten" for e in own)
    return forgotten, forms, left, most, len(result.history), seconds, result.utility.relative_rise


def _cells(values: list[tuple[float, ...]]) -> list[str]:
    forms = ["{:.0f}"] * 5 + ["{:.0f}", "{:+.1%}"]
    return [spread(column, form) for column, form in zip(zip(*values, strict=True), forms, strict=True)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=16, help="records that the model knows by heart")
    parser.add_argument("--forms", choices=("rules", "paraphrases"), default="rules", help="see above")
    parser.add_argument("--seeds", type=int, default=3, help="number of models and sets of records")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    return parser


if __name__ == "__main__":
    main()
