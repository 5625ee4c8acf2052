"""Tasks of lm-evaluation-harness (the package lm-eval), run on a model that is in memory and is not changed."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pyunlearn.data.files import expanded
from pyunlearn.errors import (
    ArgumentError,
    DataError,
    DependencyError,
    ModelError,
    brief,
    first_line,
    missing_packages,
    printable,
)
from pyunlearn.models.devices import seeded
from pyunlearn.models.harness_model import OTHER_SEED, as_it_was, quietly, random_numbers, wrapped
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.models.loading import load_tokenizer
from pyunlearn.progress import Progress

OLDEST = (0, 4, 12)
"""The first version of lm-eval with the functions that are called here."""


class TaskNumbers(NamedTuple):
    """One number that lm-eval computes of a task or group under one model, and the documents' numbers behind it."""

    task: str
    metric: str
    """Name of the metric, with that of the filter of answers where it has a name: "exact_match, strict-match"."""
    value: float
    """The number, as lm-eval computes it from all documents."""
    items: list[Any] | None
    """Number of each document, or several of them as a tuple; None where they are texts, or where the value is of a
    group and not the mean over its documents."""
    statistic: Callable[[list[Any]], float] | None
    """The items -> the value; None for their mean."""
    documents: int
    """Number of documents that were read."""
    available: int
    """Number of documents of the task."""
    higher_is_better: bool | None
    part_of: str | None
    """The group in whose number this task is contained; None for a number that was wanted by name."""
    keys: tuple[str, ...]
    """Hash of each document, its prompt and its answer: models are compared document by document where these agree."""


class TaskRun(NamedTuple):
    """The numbers of all tasks under one model."""

    numbers: list[TaskNumbers]
    requests: int
    """Number of texts that the model read or continued."""
    cut: int
    """Number of them that lm-eval cut at their beginning, since they are longer than the model's context."""


def require_lm_eval() -> None:
    """Raise DependencyError unless lm-eval is installed, in a version with the functions that are called here."""
    if importlib.util.find_spec("lm_eval") is None:
        raise missing_packages("tasks", "lm-eval", otherwise="leave tasks out")
    version = lm_eval_version()
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    if numbers < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise DependencyError(
            f"tasks needs lm-eval {oldest} or later, and {version} is installed: run `pip install -U lm-eval`"
        )


def lm_eval_version() -> str:
    """Return the installed version of lm-eval."""
    from importlib.metadata import version

    return version("lm_eval")


def task_settings(tasks: Sequence[str] | None) -> dict[str, Any]:
    """Return what a result's settings say of its tasks: the version of lm-eval, and paths as names, as of models."""
    if tasks is None:
        return {}
    names = [Path(name).name if Path(name).is_absolute() else name for name in tasks]
    return {"tasks": names, "lm_eval": lm_eval_version()}


class HarnessTasks:
    """Tasks with their documents, ready to be run on models.

    Args:
        names: names of tasks, groups and tags that lm-eval knows, or paths of YAML files.
        limit: documents of each task at most; None: all.
        model: the model that they are for, or where it is; `tokenizer` likewise. A task may count its tokens, so it
            learns where the tokenizer is; neither is loaded here.
        tokenizer: the model's, or where it is; None: where the model is.
        bar: the progress bar.

    Raises:
        DependencyError: lm-eval is missing or too old. ArgumentError: an unknown name, a task that comes twice, one
            that reads images or runs code that the model writes. DataError: a file or documents cannot be read.
    """

    def __init__(self, names: Sequence[str], limit: int | None, model: Any, tokenizer: Any, bar: Progress) -> None:
        require_lm_eval()
        self.limit = limit
        bar.say("loading the tasks")
        with quietly(bar, ""), random_numbers(None) as after:
            self._load([_path_or_name(name) for name in names], _metadata(model, tokenizer))
            self.state = after()
        self._check()

    def _load(self, names: Sequence[str], metadata: Mapping[str, Any]) -> None:
        from lm_eval.tasks import TaskManager

        groups = {name: group for name in names if _is_path(name) and (group := _group_in(name))}
        manager = TaskManager(
            include_path=sorted({str(Path(name).parent) for name in groups}) or None,
            include_defaults=bool(groups) or not all(map(_is_path, names)),
            metadata=dict(metadata),
        )
        self.tasks: dict[str, Any] = {}
        self.groups: dict[str, Any] = {}
        for name in names:
            if not _is_path(name) and name not in manager.all_tasks:
                raise ArgumentError(_unknown(name, manager.all_tasks))
            try:
                loaded = manager.load([groups.get(name, name)])
            except Exception as error:  # anything: a YAML file may contain code, and data come from elsewhere
                raise DataError(
                    f"task {name!r} cannot be loaded by lm-eval: {_fault(error)}; check its definition, and that its "
                    "data can be reached"
                ) from error
            for task_name, task in loaded["tasks"].items():
                if task_name in self.tasks:
                    raise ArgumentError(f"task {task_name!r} comes twice in tasks, by {name!r}: leave one out")
                self.tasks[task_name] = task
            self.groups |= loaded.get("groups", {})

    def _check(self) -> None:
        """Raise ArgumentError for a task that cannot be run here."""
        if not self.tasks:
            raise ArgumentError("tasks name no task of lm-eval that has documents: give others")
        for name, task in self.tasks.items():
            if getattr(task, "UNSAFE_CODE", False):
                raise ArgumentError(f"task {name!r} runs code that the model writes, which is never done here: drop it")
            if getattr(task, "MULTIMODAL", False):
                raise ArgumentError(f"task {name!r} shows the model images or sound, and only text is read: drop it")

    def run(self, lm: LanguageModel, *, batch_size: int, bar: Progress, who: str) -> TaskRun:
        """Run the tasks on a model, which stays as it is: weights, mode, tokenizer, and the random generators.

        Args:
            lm: the model with its tokenizer.
            batch_size: texts in one forward pass.
            bar: the progress bar.
            who: name of the model in messages: "the model".

        Raises ModelError where lm-eval ends with an error.
        """
        from lm_eval.evaluator import evaluate

        for task in self.tasks.values():  # as lm-eval's simple_evaluate does
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=OTHER_SEED)
        loaded = {
            "tasks": self.tasks,
            "groups": self.groups,
            "group_map": {name: group.child_names for name, group in self.groups.items()},
        }
        bar.say(f"running tasks with {who}")
        with quietly(bar, who), random_numbers(self.state), seeded(OTHER_SEED, lm.device), as_it_was(lm):
            try:
                taken = wrapped(lm, batch_size)
                results = evaluate(lm=taken, task_dict=loaded, limit=self.limit, bootstrap_iters=0)
            except Exception as error:  # anything: a task may contain code
                names = ", ".join(self.tasks)
                raise ModelError(
                    f"lm-eval cannot run the tasks {brief(names)} on {who}: {_fault(error)}; leave tasks out or give "
                    "others"
                ) from error
        return TaskRun(self._numbers(results), taken.requests, taken.cut)

    def _numbers(self, results: Mapping[str, Any]) -> list[TaskNumbers]:
        """Return the numbers of groups and tasks, those of a group before those of its tasks."""
        numbers = [x for name in self.groups for x in self._group_numbers(name, results)]
        within = {child: x.task for x in reversed(numbers) for child in self._leaves(x.task)}
        for name in self.tasks:
            for metric, filter_name, value in _values(results["results"][name]):
                samples = [s for s in results["samples"][name] if s["filter"] == filter_name and metric in s]
                items = [s[metric] for s in samples]
                numbers.append(
                    TaskNumbers(
                        task=name,
                        metric=_metric_name(metric, filter_name),
                        value=value,
                        items=_plain(items),
                        statistic=_statistic(self.tasks[name], metric),
                        documents=len(items),
                        available=results["n-samples"][name]["original"],
                        higher_is_better=results["higher_is_better"].get(name, {}).get(metric),
                        part_of=within.get(name),
                        keys=tuple(map(_key, samples)),
                    )
                )
        return numbers

    def _group_numbers(self, name: str, results: Mapping[str, Any]) -> Iterator[TaskNumbers]:
        """Yield what lm-eval aggregates over a group; the documents' numbers where it is the mean over all of them."""
        leaves = self._leaves(name)
        counts = [results["n-samples"][leaf] for leaf in leaves]
        wider = (g for g in self.groups if any(_values(results["results"].get(g, {}))))
        outer = next((g for g in wider if set(leaves) < set(self._leaves(g))), None)
        for metric, filter_name, value in _values(results["results"].get(name, {})):
            rows = [s for leaf in leaves for s in results["samples"][leaf] if s["filter"] == filter_name]
            items = _plain([s[metric] for s in rows if metric in s])
            simple = items is not None and not any(isinstance(x, tuple) for x in items)
            pooled = simple and bool(np.isclose(np.mean(np.array(items, dtype=np.float64)), value, rtol=1e-6))
            directions = {results["higher_is_better"].get(leaf, {}).get(metric) for leaf in leaves}
            yield TaskNumbers(
                task=name,
                metric=_metric_name(metric, filter_name),
                value=value,
                items=items if pooled else None,
                statistic=None,
                documents=sum(count["effective"] for count in counts),
                available=sum(count["original"] for count in counts),
                higher_is_better=next(iter(directions)) if len(directions) == 1 else None,
                part_of=outer,
                keys=tuple(_key(s) for s in rows if metric in s),
            )

    def _leaves(self, name: str) -> list[str]:
        """Return the names of a group's tasks, those of the groups in it too."""
        return [task.task_name for task in self.groups[name].get_all_tasks()]


# ---------------------------------------------------------------- names, and what a task learns of the model


def _is_path(name: str) -> bool:
    return name.lower().endswith((".yaml", ".yml"))


def _path_or_name(name: str) -> str:
    """Return a name, or the whole path of a YAML file. Raises DataError where there is no such file."""
    if not _is_path(name):
        return name.strip()
    path = expanded(name).resolve()
    if not path.is_file():
        raise DataError(f"the task's file {name} was not found: check its path")
    return str(path)


def _group_in(path: str) -> str | None:
    """Return the name of the group that a YAML file defines; its tasks are looked for next to it and in lm-eval."""
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    line = re.search(r"""^["']?group["']?\s*:\s*["']?([^"'#\n]+)""", text, re.M)
    return None if line is None else line[1].strip()


def _unknown(name: str, known: Sequence[str]) -> str:
    close = get_close_matches(name, known, n=1)
    mend = f'did you mean "{close[0]}"?' if close else "`lm-eval ls tasks` lists them; a file's name ends with .yaml"
    return f"task {brief(name)} is none that lm-eval {lm_eval_version()} knows: {mend}"


def _metadata(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Return what tasks learn of the model: the tokenizer, or where it is, as lm-eval's own command tells them."""
    if tokenizer is None and isinstance(model, LanguageModel):
        tokenizer = model.tokenizer
    where = model if isinstance(model, (str, Path)) else getattr(model, "name_or_path", None)
    source = where if tokenizer is None else tokenizer
    if isinstance(source, (str, Path)) and str(source).endswith(".gguf"):  # transformers needs another call for it
        source = load_tokenizer(source)
    elif isinstance(source, Path):
        source = str(source)
    return {"tokenizer": source} if source else {}


def _fault(error: Exception) -> str:
    """Return the type of an error and the first line of its message, short."""
    line = printable(first_line(error))
    return f"{type(error).__name__}: {line if len(line) <= 200 else line[:200] + '...'}"


# ---------------------------------------------------------------- the results of lm-eval


def _values(row: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Yield (metric, filter, value) of each number in a row of lm-eval's results, without standard errors."""
    for key, value in row.items():
        metric, comma, name = key.partition(",")
        number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
        if comma and number and not metric.endswith("_stderr"):
            yield metric, name, float(value)


def _metric_name(metric: str, filter_name: str) -> str:
    return metric if filter_name == "none" else f"{metric}, {filter_name}"


def _statistic(task: Any, metric: str) -> Callable[[list[Any]], float] | None:
    """Return the function from the documents' numbers to the task's; None for the mean, lm-eval's default too."""
    function = task.aggregation().get(metric)
    return None if function is None or getattr(function, "__name__", "") == "mean" else function


def _plain(items: Sequence[Any]) -> list[Any] | None:
    """Return the items if each is a number or a tuple of numbers, and else None: of texts nothing is kept."""

    def number(x: Any) -> bool:
        return isinstance(x, (bool, int, float, np.number, np.bool_))

    def plain(x: Any) -> bool:
        return number(x) or (isinstance(x, (tuple, list)) and all(map(number, x)))

    return [tuple(x) if isinstance(x, (tuple, list)) else float(x) for x in items] if all(map(plain, items)) else None


def _key(sample: Mapping[str, Any]) -> str:
    return f"{sample['doc_id']} {sample['doc_hash']} {sample['prompt_hash']} {sample['target_hash']}"
