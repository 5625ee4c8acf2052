"""A model as lm-evaluation-harness (the package lm-eval) takes it, and lm-eval without its output and side effects."""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import io
import logging
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from pyunlearn.models.language_model import LanguageModel
from pyunlearn.models.scoring import evaluation_mode
from pyunlearn.progress import Progress

OTHER_SEED = 1234
"""The seed with which lm-eval's own command seeds numpy, torch and the choice of solved examples."""
_SEED = 0  # likewise of `random`
_WITH_BARS = ("lm_eval.api.task", "lm_eval.api.model", "lm_eval.models.huggingface")
_LOGGERS = ("lm_eval", "datasets", "evaluate", "huggingface_hub", "transformers", "absl")


def wrapped(lm: LanguageModel, batch_size: int) -> Any:
    """Return the model as lm-eval takes it, with a copy of its tokenizer; `requests` and `cut` count texts."""
    from lm_eval.models.huggingface import HFLM

    class Wrapped(HFLM):  # type: ignore[misc]
        requests, cut = 0, 0

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **options: Any) -> Any:
            for _, context, continuation in requests:
                length = len(context) + (0 if self.backend == "seq2seq" else len(continuation) - 1)
                self.cut += length > self.max_length
            self.requests += len(requests)
            return super()._loglikelihood_tokens(requests, *args, **options)

        def tok_batch_encode(self, strings: Any, *args: Any, **options: Any) -> Any:
            bound = inspect.signature(super().tok_batch_encode).bind(strings, *args, **options).arguments
            longest = bound.pop("left_truncate_len", None)
            whole = super().tok_batch_encode(**bound)
            self.requests += len(strings)
            if longest:
                self.cut += int((whole[1].sum(1) > longest).sum())
                whole = tuple(part[:, -longest:] for part in whole)
            return whole

    tokenizer = copy.deepcopy(lm.tokenizer)  # lm-eval sets its pad token
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = lm.pad_id
    model = lm.module if hasattr(lm.module, "get_base_model") else lm.inner  # an adapter of PEFT counts
    return Wrapped(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=lm.context_length)


@contextmanager
def as_it_was(lm: LanguageModel) -> Iterator[None]:
    """Leave the model's modules in their modes, and its weights untied where they are: lm-eval ties them again."""
    lm.inner.tie_weights = lambda *_, **__: None
    try:
        with evaluation_mode(lm.module):
            yield
    finally:
        del lm.inner.tie_weights


@contextmanager
def quietly(bar: Progress, who: str) -> Iterator[None]:
    """Show nothing of what lm-eval and the libraries below it print, log or warn; count its requests on the bar."""
    import datasets
    from tqdm import tqdm

    for name in _WITH_BARS:
        importlib.import_module(name)

    class Counting(tqdm):  # type: ignore[misc,type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **(options | {"disable": True}))
            if self.iterable is None and self.total:
                bar.begin(f"running tasks with {who}", self.total)

        def update(self, n: float | None = 1) -> None:
            bar.advance(int(n or 0))

    modules: list[Any] = [m for name, m in sys.modules.items() if name.startswith("lm_eval.") and hasattr(m, "tqdm")]
    bars = {module: module.tqdm for module in modules}
    loggers = {logger: logger.level for logger in map(logging.getLogger, _LOGGERS)}
    shown = not datasets.are_progress_bars_disabled()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            datasets.disable_progress_bars()
            for module in bars:
                module.tqdm = Counting
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            for module, own in bars.items():
                module.tqdm = own
            for logger, level in loggers.items():
                logger.setLevel(level)
            if shown:
                datasets.enable_progress_bars()


@contextmanager
def random_numbers(state: tuple[Any, Any] | None) -> Iterator[Callable[[], tuple[Any, Any]]]:
    """Seed `random` and numpy as lm-eval does, or go back to `state`; afterwards restore what they were.

    Yields a function that returns the state of both.
    """

    def now() -> tuple[Any, Any]:
        return random.getstate(), np.random.get_state()  # noqa: NPY002

    own = now()
    try:
        if state is None:
            random.seed(_SEED)
            np.random.seed(OTHER_SEED)  # noqa: NPY002
        else:
            random.setstate(state[0])
            np.random.set_state(state[1])  # noqa: NPY002
        yield now
    finally:
        random.setstate(own[0])
        np.random.set_state(own[1])  # noqa: NPY002
