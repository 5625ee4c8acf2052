"""Measurer: reads the questions of a benchmark with one model; log-likelihoods of answers, and what it writes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyunlearn.benchmarking.config import BenchConfig
from pyunlearn.data import Example, TokenBatch, Tokens, read_examples
from pyunlearn.data.rendering import Rendering, rendering_of
from pyunlearn.errors import DataError, ModelError
from pyunlearn.models.condition import to_device
from pyunlearn.models.devices import default_device
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.models.scoring import Scorer, evaluation_mode
from pyunlearn.probes.decoding import greedy_continuations, room_after
from pyunlearn.progress import Progress

Floats = NDArray[np.float64]


class _Counting(Scorer):
    """Scorer that counts the texts of each finished batch."""

    bar: Progress

    def batches(self, tokens: Sequence[Tokens]) -> Iterator[tuple[list[int], TokenBatch]]:
        """Yield the batches of `Scorer.batches`."""
        for indices, batch in super().batches(tokens):
            yield indices, batch
            self.bar.advance(len(indices))


class Measurer:
    """Reads questions with one model, in one rendering.

    Args:
        model: a model, or where to load it from; then it runs on the commands' device.
        tokenizer: the model's, or where it is; None: where the model came from.
        config: the settings.
        bar: the progress bar.
        who: name of the model in messages: "the model", "the retrained model".
    """

    def __init__(self, model: Any, tokenizer: Any, config: BenchConfig, bar: Progress, who: str) -> None:
        self.lm = LanguageModel.of(model, tokenizer, workspace=config.workspace)
        if isinstance(model, (str, Path)):
            to_device(self.lm.module, default_device())
        self.config, self.bar, self.who = config, bar, who
        self.notes: list[str] = []  # on what was written
        own = "chat" if getattr(self.lm.tokenizer, "chat_template", None) else "plain"
        self.template = own if config.template == "default" else config.template
        self.rendering: Rendering = rendering_of(self.template, self.lm.tokenizer)

    @property
    def form(self) -> str:
        """Description of the rendering, with the digest of a chat template: its name does not tell what it writes."""
        own = self.lm.tokenizer.chat_template if self.rendering.key == "chat" else self.rendering.chat_template
        if own is None:
            return self.rendering.name
        return f"{self.rendering.name} (SHA-256 {hashlib.sha256(str(own).encode()).hexdigest()[:12]})"

    def log_likelihood(self, pairs: Sequence[tuple[str, str]], what: str) -> Floats:
        """Return (n,) mean log-likelihoods of answers after their questions, nats per token, end of text included.

        Args:
            pairs: n questions with an answer each.
            what: name of the answers, for the progress bar and messages: "forget answer".

        Raises ModelError where one is not finite, DataError where one is longer than the context.
        """
        return self.score(self._encode(pairs, what), what)

    def score(self, tokens: Sequence[Tokens], what: str) -> Floats:
        """Return (n,) mean log-likelihoods of the scored tokens, nats per token. Raises ModelError as above."""
        once = {t: i for i, t in enumerate(dict.fromkeys(tokens))}
        scorer = _Counting(self.lm, self.config.batch_size)
        scorer.bar = self.bar
        self.bar.begin(f"reading {what}s with {self.who}", len(once))
        with evaluation_mode(self.lm.module):
            values = scorer.mean_log_likelihood(list(once))
        self._require_finite(values)
        return values[[once[t] for t in tokens]]

    def written(self, pairs: Sequence[tuple[str, str]], what: str, longest: int) -> list[str]:
        """Return what the model writes greedily after each question, up to its end of text.

        Arguments as above; `longest`: tokens at most.
        """
        return self._decoded(self._encode(pairs, what), what, longest)

    def _decoded(self, tokens: Sequence[Tokens], what: str, longest: int) -> list[str]:
        self.bar.begin(f"writing {what}s with {self.who}", len(set(tokens)))
        ids = greedy_continuations(
            self.lm,
            tokens,
            longest=longest,
            beyond=True,
            batch_size=self.config.batch_size,
            advance=self.bar.advance,
        )
        rooms = [room_after(self.lm, t, longest) for t in tokens]
        if cut := sum(len(row) == room < longest for row, room in zip(ids, rooms, strict=True)):
            self.notes.append(
                f"{cut} of {len(ids)} {what}s filled the model's context of {self.lm.context_length} tokens before the "
                f"{longest} that they may have: the score can be another with a longer context."
            )
        return [self.lm.tokenizer.decode(row, skip_special_tokens=True) for row in ids]

    def encode(self, examples: Sequence[Example], what: str, *, chat_template: str | None = None) -> list[Tokens]:
        """Return the tokens of examples. Raises DataError where one is longer than the context."""
        tokens = self.lm.encode({what: examples}, chat_template=chat_template, limited=False)[what]
        self._require_room(tokens, what)
        return tokens

    def _require_room(self, tokens: Sequence[Tokens], what: str) -> None:
        context = self.lm.context_length
        for number, t in enumerate(tokens if context is not None else (), 1):
            longest = max(len(t.ids), len(t.decoder or ()))
            if context is not None and longest > context:
                raise DataError(
                    f"{what} {number} has {longest} tokens with what stands before it, and the model's context has "
                    f"{context}: a benchmark cuts no text, give a model with a longer context"
                )

    def _require_finite(self, values: Floats) -> None:
        if not np.isfinite(values).all():
            raise ModelError(
                f"{self.who} gives text NaN or Inf as log-likelihood: its weights are broken, or too large for their "
                "dtype"
            )

    def token_log_likelihood(self, tokens: Sequence[Tokens], what: str) -> list[Floats]:
        """Return for each text (T,) the log-likelihoods of its scored tokens, nats. Raises ModelError as above."""
        scorer = _Counting(self.lm, self.config.batch_size)
        scorer.bar = self.bar
        self.bar.begin(f"reading {what}s with {self.who}", len(tokens))
        with evaluation_mode(self.lm.module):
            values = scorer.token_log_likelihood(tokens)
        self._require_finite(np.concatenate(values))
        return values

    def continued(self, prompts: Sequence[str], what: str, longest: int) -> list[str]:
        """Return what the model writes greedily after prompts that it reads as they are, `longest` tokens at most.

        Raises DataError where a prompt fills the context.
        """
        tokens = []
        for prompt in prompts:
            ids = tuple(self.lm.tokenizer(prompt)["input_ids"])
            after = (self.lm.pad_id,)  # stands for what is written, and is never read
            tokens.append(Tokens(ids, 0, after) if self.lm.is_encoder_decoder else Tokens(ids + after, len(ids)))
        self._require_room(tokens, what)
        return self._decoded(tokens, what, longest)

    def first_tokens(self, text: str, count: int) -> str:
        """Return the beginning of a text, as many tokens of it, special ones included."""
        ids = self.lm.tokenizer(text)["input_ids"][:count]
        return str(self.lm.tokenizer.decode(ids, skip_special_tokens=True))

    def _encode(self, pairs: Sequence[tuple[str, str]], what: str) -> list[Tokens]:
        rows: list[dict[str, str]] = [{"question": question, "answer": answer} for question, answer in pairs]
        examples: list[Example] = [self.rendering.of(e) for e in read_examples(rows, role=what)]
        return self.encode(examples, what, chat_template=self.rendering.chat_template)
