"""MUSE (Shi et al. 2024, arXiv 2407.06460): verbatim memorization, knowledge memorization, and privacy leakage.

Prompts, lengths and scores are those of MUSE's own evaluation: VerbMem and KnowMem are the mean ROUGE-L F1, without a
stemmer, of what the model writes greedily; PrivLeak compares the areas under the ROC curve of the Min-40 % attack.
There is no chat template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pyunlearn.benchmarking.config import BenchConfig
from pyunlearn.benchmarking.files import Questions, file_in, files_in, read_questions
from pyunlearn.benchmarking.measurer import Measurer
from pyunlearn.benchmarking.result import Column, Numbers
from pyunlearn.data import Example
from pyunlearn.metrics import auc, mean_interval, min_k_score, privleak_interval, rouge_l

COMPARED = {"privleak forget": ("min_k",), "privleak holdout": ("min_k",)}
"""Sets that the retrained model reads, and the numbers of them that are compared."""
RENDERING = "the prompts of MUSE"
VERBATIM, KNOWLEDGE = 128, 32
"""Tokens written for a passage and for an answer."""
_MIN_K = 0.4
_FILES = {
    "verbmem forget": ("verbmem/forget", {"prompt": "text", "gt": "answer"}),
    "knowmem forget": ("knowmem/forget_qa", {"question": "text", "answer": "answer"}),
    "knowmem retain": ("knowmem/retain_qa", {"question": "text", "answer": "answer"}),
    "privleak forget": ("privleak/forget", {"text": "text"}),
    "privleak holdout": ("privleak/holdout", {"text": "text"}),
}
_COLUMNS = {
    "verbmem forget": ("forget", "VerbMem"),
    "knowmem forget": ("forget", "KnowMem"),
    "knowmem retain": ("retain", "KnowMem"),
}
_WITH_EXAMPLES = ("knowmem forget", "knowmem retain")
_EXAMPLES = " examples"  # end of the name of the set with the solved questions before each question
_ENDS = ("\n\n", "\nQuestion", "Question:")  # of an answer


def files(config: BenchConfig) -> list[str]:
    """Return the names of the files that are read, those with solved questions too."""
    return [name for name, _ in _FILES.values()] + [f"{_FILES[each][0]}_icl" for each in _WITH_EXAMPLES]


def read(folder: Path, config: BenchConfig) -> dict[str, Questions]:
    """Return the texts of all sets, and of the solved questions where there are any.

    Raises DataError where a file or a column is missing.
    """
    wanted = [file for file, _ in _FILES.values()]
    paths = {name: file_in(folder, file, wanted) for name, (file, _) in _FILES.items()}
    sets = {name: read_questions(path, name, _FILES[name][1], config.first) for name, path in paths.items()}
    for name in _WITH_EXAMPLES:
        for path in files_in(folder, f"{_FILES[name][0]}_icl"):
            sets[name + _EXAMPLES] = read_questions(path, name + _EXAMPLES, _FILES[name][1] | {"answer": "text"}, None)
    return sets


def attacked(sets: Mapping[str, Questions]) -> dict[str, list[dict[str, str]]]:
    """Return the texts that are attacked, and as many that were never trained on."""
    return {role: sets[f"privleak {role}"].rows for role in ("forget", "holdout")}


def measure(
    measurer: Measurer, sets: Mapping[str, Questions], config: BenchConfig, *, retrained: bool = False
) -> Numbers:
    """Return the numbers of each text: `rouge` of the first three sets, and `min_k` (low = member) of the last two.

    Of the retrained model `min_k` alone.
    """
    numbers: Numbers = {}
    for name in () if retrained else _COLUMNS:
        rows = sets[name].rows
        if name.startswith("verbmem"):
            truths = [measurer.first_tokens(row["gt"], VERBATIM) for row in rows]
            written = measurer.continued([row["prompt"] for row in rows], f"{name} passage", VERBATIM)
        else:
            solved = sets[name + _EXAMPLES].rows if name + _EXAMPLES in sets else []
            prompts, truths = prompts_of(rows, solved), [row["answer"] for row in rows]
            written = [answer_in(text) for text in measurer.continued(prompts, f"{name} answer", KNOWLEDGE)]
        numbers[name] = {"rouge": rouge_l(written, truths)}
    for name in COMPARED:
        examples = [Example("", row["text"]) for row in sets[name].rows]
        tokens = measurer.encode(examples, f"{name} text")
        numbers[name] = {"min_k": min_k_score(measurer.token_log_likelihood(tokens, f"{name} text"), k=_MIN_K)}
    return numbers


def prompts_of(rows: Sequence[Mapping[str, Any]], solved: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what the model reads before each answer: solved questions, and the question; it ends with a space.

    >>> prompts_of([{"question": "Who?"}], [{"question": "When?", "answer": "Now."}])
    ['Question: When?\\nAnswer: Now.\\n\\nQuestion: Who?\\nAnswer: ']
    """
    shots = "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in solved)
    return [f"{shots}Question: {row['question']}\nAnswer: " for row in rows]


def answer_in(text: str) -> str:
    """Return the answer in what a model wrote: up to a blank line or another question.

    >>> answer_in(" Ann\\nQuestion: Who?\\nAnswer: Tom")
    ' Ann'
    """
    for end in _ENDS:
        text = text.split(end)[0]
    return text


def columns(numbers: Numbers, retrained: Numbers | None, config: BenchConfig) -> list[Column]:
    """Return VerbMem and KnowMem of both sets, each 0 to 1, and PrivLeak in percent.

    Without a retrained model, PrivLeak compares with chance. It is left out where it has no value, see `_separated`.
    """
    out = []
    for name, (row, measure_name) in _COLUMNS.items():
        values = numbers[name]["rouge"]
        interval = mean_interval(values, bounds=(0, 1), seed=config.seed)
        out.append(Column.of(row, measure_name, interval, values.size))
    if _separated(retrained):
        return out
    scores = [numbers[name]["min_k"] for name in COMPARED]
    others = [None, None] if retrained is None else [retrained[name]["min_k"] for name in COMPARED]
    leak = privleak_interval(*scores, *others, seed=config.seed)
    return [*out, Column.of("", "PrivLeak", leak, sum(x.size for x in scores))]


def _separated(retrained: Numbers | None) -> bool:
    """Return whether a retrained model tells forget set and holdout wholly apart, so that no area can be above its."""
    return retrained is not None and auc(*(retrained[name]["min_k"] for name in COMPARED)).estimate == 1


def notes(numbers: Numbers, retrained: Numbers | None) -> list[str]:
    """Return sentences on what PrivLeak compares with."""
    if retrained is None:
        return [
            "PrivLeak is against chance, an area of 0.5: the published one compares with a model retrained without the "
            "forget set (--retrained)."
        ]
    if _separated(retrained):
        return [
            "PrivLeak is left out: under the retrained model each forget text looks more trained-on than all of the "
            "holdout, an area of 1, against which nothing can be measured."
        ]
    if all(np.array_equal(numbers[name]["min_k"], retrained[name]["min_k"]) for name in COMPARED):
        return [
            "The model gives every text the scores that the retrained model gives it, as if it were the same model: "
            "then PrivLeak is 0 by definition."
        ]
    return []
