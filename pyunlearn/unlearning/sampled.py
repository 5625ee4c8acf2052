"""Texts that a run samples from the model itself: alternates to the forget texts, and texts to hold."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from pyunlearn.data import Tokens
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.models.sampling import sample_alternates, sample_own_texts, sample_unseen_answers
from pyunlearn.progress import Progress
from pyunlearn.unlearning.distributed import Processes


class SampledTexts:
    """Samples texts in the main process, or takes those of a checkpoint: sampling repeats itself on few devices.

    Args:
        lm: the model.
        forget: the forget texts.
        stored: name -> texts in the checkpoint of an interrupted run; those of this run are added.
        seed: seed of the sampling.
        processes: the processes that get the texts.
        bar: shows the present stage.
    """

    def __init__(
        self,
        lm: LanguageModel,
        forget: list[Tokens],
        stored: dict[str, Any],
        *,
        seed: int,
        processes: Processes,
        bar: Progress,
    ) -> None:
        self.lm, self.forget, self.stored, self.seed = lm, forget, stored, seed
        self.processes, self.bar = processes, bar

    def alternates(self, count: int) -> list[Tokens]:
        """Return `count` other answers for each forget text, text by text (AltPO)."""
        self.bar.say("sampling other answers of the model's own")
        sample = partial(sample_alternates, self.lm, self.forget, count=count, seed=self.seed)
        return self._once("alternates", sample, count * len(self.forget))

    def to_hold(self) -> list[Tokens]:
        """Return text that stands in for a retain set; none from an encoder-decoder model."""
        self.bar.say("sampling text to hold")
        return self._once("held", partial(sample_own_texts, self.lm, self.forget, seed=self.seed))

    def unseen_answers(self, retain: list[Tokens]) -> list[Tokens]:
        """Return what the model answers to prompts that no record has, in the form of the retain set's."""
        self.bar.say("sampling answers to hold")
        sample = partial(sample_unseen_answers, self.lm, retain, self.forget, seed=self.seed)
        return self._once("unseen answers", sample)

    def _once(self, name: str, sample: Callable[[], list[Tokens]], count: int | None = None) -> list[Tokens]:
        """Return the stored texts of that name where they fit the model and the count; sample them where not."""
        stored = self.stored.get(name, [])
        texts = [Tokens(tuple(ids), first, decoder and tuple(decoder)) for ids, first, decoder in stored]
        complete = bool(texts) and len(texts) == (count or len(texts))
        if not complete or not all(max(*t.ids, *t.written) < self.lm.vocabulary for t in texts):
            texts = self.processes.once(sample)
        self.stored[name] = [(list(t.ids), t.first, t.decoder and list(t.decoder)) for t in texts]
        return texts
