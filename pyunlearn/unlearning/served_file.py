"""The GGUF file that a run is for: its weights are rounded to the formats of the file before the first score on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyunlearn.errors import ArgumentError
from pyunlearn.models.adapters import merged
from pyunlearn.models.gguf_formats import bits_per_weight
from pyunlearn.models.gguf_layout import formats_of, read_like
from pyunlearn.models.gguf_rounding import FLOATS, round_to, rounded_as, spread
from pyunlearn.models.gguf_writing import adapter_error, require_plain
from pyunlearn.models.inspection import unwrapped
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.unlearning.distributed import Processes
from pyunlearn.unlearning.result import Result

_ENOUGH = "Q8_0"  # a format whose steps are small against the changes of a run


class ServedFile:
    """Formats of the GGUF file in which a model is served; without a file there are none, and nothing is rounded.

    Args:
        like: path of the file, or None.
        at_least: format of weights that have a smaller one there.
        seed: of the numbers from which the run starts, see `spread`.

    Raises ModelError where the file cannot be used, and DependencyError without the package gguf.
    """

    def __init__(self, like: str | Path | None, at_least: str | None, seed: int) -> None:
        self.like, self.at_least, self.seed = like, at_least, seed
        self._reader = None if like is None else read_like(like)
        self.formats: dict[nn.Parameter, str] = {}
        self._read_from = ""  # path of the GGUF file that the model was read from

    def match(self, lm: LanguageModel, processes: Processes, *, adapts: bool, merges: bool) -> None:
        """Set `formats`, those of the model's weights. Raises for a model that is not that of the file.

        Those of a model that has an adapter already are set when it is merged.

        Args:
            lm: the model, before it gets an adapter.
            processes: the processes of the run, one.
            adapts: whether the run makes an adapter.
            merges: whether it merges the adapter.
        """
        path = str(getattr(lm.inner, "name_or_path", ""))
        self._read_from = path if path.endswith(".gguf") and Path(path).exists() else ""
        if self._reader is None:
            return
        if processes.count > 1:
            raise ArgumentError(
                "gguf_like needs a run in one process: leave it out, and write the file of the saved folder with "
                "pyunlearn.output.save_gguf"
            )
        has_adapter = hasattr(lm.module, "peft_config")
        if (has_adapter or adapts) and not merges:
            raise adapter_error()
        if not has_adapter:
            require_plain(lm.inner)
            self.formats = self._formats(lm.inner)

    @torch.no_grad()
    def round(self) -> None:
        """Round the weights, in place."""
        for p, name in self.formats.items():
            round_to(p, name)

    @torch.no_grad()
    def merged(self, model: Any) -> Any:
        """Merge the adapter of a PEFT model into its weights and round these; return the model without the adapter."""
        generator = torch.Generator().manual_seed(self.seed)
        for p, name in self.formats.items():
            unrounded = spread(p, name, generator).to(p.dtype)
            p.copy_(torch.where(rounded_as(unrounded, name).to(p.dtype) == p, unrounded, p))
        model = merged(model)
        if self._reader is not None and not self.formats:
            self.formats = self._formats(unwrapped(model))
        self.round()
        return model

    def notes(self, result: Result) -> list[str]:
        """Return a sentence on what was measured, and one on what helps where a text is exposed in few bits.

        Or, of a model from a GGUF file that was not rounded to its formats, one that says what can follow.
        """
        if result.stopped == "interrupted":
            return []
        if self._reader is None and self._read_from and any(e.forgotten for e in result.examples):
            count = sum(_in_few_bits(t.tensor_type.name) for t in read_like(self._read_from).tensors)
            if not count:
                return []
            return [
                f"The model was read from {Path(self._read_from).name}, with {count} tensors in few bits: rounded so "
                "again it can have the texts again. gguf_like (--gguf-like) with that file unlearns in its formats."
            ]
        if not self.formats:
            return []
        counts = Counter(self.formats.values())
        names = ", ".join(f"{n} {name}" for name, n in counts.most_common())
        notes = [f"The numbers after the run are those of weights that are rounded as in a GGUF file ({names})."]
        few = [name for name in counts if _in_few_bits(name)]
        if few and not result.passed:
            most = max(few, key=counts.__getitem__)
            notes.append(
                f"{counts[most]} of {len(self.formats)} have {most}, in which a small change can be lost: "
                f'gguf_at_least="{_ENOUGH}" (--gguf-at-least {_ENOUGH}) has finer steps.'
            )
        return notes

    def _formats(self, model: Any) -> dict[nn.Parameter, str]:
        """Return weight -> format, of the weights that it rounds."""
        assert self.like is not None
        formats = formats_of(self._reader, model, self.like, self.at_least)
        return {p: name for p, name in formats.items() if FLOATS.get(name) not in (torch.float32, p.dtype)}


def _in_few_bits(name: str) -> bool:
    return bits_per_weight(name) < bits_per_weight(_ENOUGH)
