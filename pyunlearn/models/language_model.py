"""LanguageModel: a model, its tokenizer and the facts derived from both, made once at each entry point."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pyunlearn.data import Example, TokenBatch, Tokens, batches, collate, encode
from pyunlearn.data.tokens import padding_id
from pyunlearn.errors import ModelError
from pyunlearn.models import inspection
from pyunlearn.models.condition import device_of, require_loaded
from pyunlearn.models.likelihood import Likelihood
from pyunlearn.models.loading import load, load_tokenizer, require_loadable
from pyunlearn.options import require_path


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A causal or encoder-decoder language model of transformers, its tokenizer, and the facts derived from both.

    `module`               the model that is called and trained, with its PEFT, DDP or torch.compile wrappers
    `inner`                the transformers model inside
    `tokenizer`            the model's own; None where no text is encoded or generated
    `is_encoder_decoder`   True for T5 and other encoder-decoder models
    `context_length`       positions of the longest sequence, or None without a limit
    `pad_id`               the id that pads batches; padding is neither attended to nor scored
    `decoder_start_id`     the id that a decoder starts from; None for a causal model
    `vocabulary`           rows of the input embedding
    `workspace`            bytes for cached logits, see `pyunlearn.ops.linear_log_likelihood`
    """

    module: Any
    inner: Any
    tokenizer: Any
    is_encoder_decoder: bool
    context_length: int | None
    pad_id: int
    decoder_start_id: int | None
    vocabulary: int
    workspace: int | None = None

    @classmethod
    def of(
        cls, model: Any, tokenizer: Any = None, *, workspace: int | None = None, needs_tokenizer: bool = True
    ) -> LanguageModel:
        """Make one from a model object, or from a path or name to load it from; return a LanguageModel unchanged.

        Args:
            model: a transformers language model, a folder, a .gguf file, a name on the Hugging Face hub.
            tokenizer: the model's, or where to load it from; default: where the model was loaded from.
            workspace: bytes for cached logits.
            needs_tokenizer: False where no text is encoded or generated.

        Raises:
            ModelError: the model has no language-model head, or it does not tell where its tokenizer is.
        """
        if isinstance(model, LanguageModel):
            return model
        if isinstance(model, (str, Path)):
            model, tokenizer = load(model, tokenizer=tokenizer)
        else:
            inspection.require_language_model(model)
            require_loaded(model)
        inner = inspection.require_language_model(model)
        if needs_tokenizer:
            tokenizer = _tokenizer(inner, tokenizer)
        return cls.described(model, tokenizer, workspace=workspace)

    @classmethod
    def described(cls, model: Any, tokenizer: Any, *, workspace: int | None = None) -> LanguageModel:
        """Make one from a model object that may be without weights, and its tokenizer, unchecked."""
        inner = inspection.unwrapped(model)
        both = inspection.is_encoder_decoder(inner)
        vocabulary = int(inner.get_input_embeddings().weight.shape[0])
        pad_id = 0 if tokenizer is None else padding_id(tokenizer)
        return cls(
            module=model,
            inner=inner,
            tokenizer=tokenizer,
            is_encoder_decoder=both,
            context_length=inspection.context_length(inner, encoder_decoder=both),
            pad_id=pad_id if pad_id < vocabulary else 0,  # padding is neither attended to nor scored
            decoder_start_id=inspection.decoder_start_id(inner) if both else None,
            vocabulary=vocabulary,
            workspace=workspace,
        )

    @property
    def device(self) -> torch.device:
        """Device of the inputs and outputs at present, see `pyunlearn.models.condition.device_of`."""
        return device_of(self.inner)

    @property
    def name(self) -> str:
        """Name of the model's class, for messages."""
        return type(self.inner).__name__

    @cached_property
    def likelihood(self) -> Likelihood:
        """Token log-likelihoods under this model; made at first use, since making it chooses the backend."""
        return Likelihood(self.module, workspace=self.workspace)

    def encode(
        self,
        examples: Mapping[str, Sequence[Example]],
        *,
        truncate: bool = False,
        chat_template: str | None = None,
        limited: bool = True,
    ) -> dict[str, list[Tokens]]:
        """Tokenize examples by role ("forget", "retain", ...), as `pyunlearn.data.encode` does, and with its errors.

        Args:
            examples: role -> examples.
            truncate: cut what is longer than the context.
            chat_template: Jinja source in place of the tokenizer's chat template.
            limited: False where texts may be longer than the context.

        Raises ModelError where a token is none of the model's.
        """
        encoded = {
            role: encode(
                each,
                self.tokenizer,
                role=role,
                max_length=self.context_length if limited else None,
                encoder_decoder=self.is_encoder_decoder,
                truncate=truncate,
                chat_template=chat_template,
            )
            for role, each in examples.items()
        }
        largest = max((max(*t.ids, *t.written) for each in encoded.values() for t in each), default=0)
        if largest >= self.vocabulary:
            raise ModelError(
                f"the tokenizer has more tokens than the model: it writes token id {largest}, and the embedding has "
                f"{self.vocabulary} rows; give the tokenizer that the model was trained with, or enlarge the model "
                "(resize_token_embeddings)"
            )
        return encoded

    def collate(self, tokens: Sequence[Tokens], indices: Iterable[int] | None = None) -> TokenBatch:
        """Pad the tokens at `indices` (default: all) into one batch on the model's device."""
        chosen = tokens if indices is None else [tokens[i] for i in indices]
        batch = collate(chosen, pad_id=self.pad_id, decoder_start_id=self.decoder_start_id)
        return batch.to(self.device)

    def batches(self, tokens: Sequence[Tokens], batch_size: int) -> Iterator[tuple[list[int], TokenBatch]]:
        """Yield (indices into `tokens`, their batch on the model's device), texts of like length together."""
        device = self.device
        for indices, batch in batches(tokens, batch_size, pad_id=self.pad_id, decoder_start_id=self.decoder_start_id):
            yield indices, batch.to(device)

    def require_vocabulary(self, other: LanguageModel, name: str) -> None:
        """Raise ModelError unless another model, `name` in the message, has as many token ids as this one."""
        if other.vocabulary != self.vocabulary:
            raise ModelError(f"{name} has another vocabulary than the model: give one of the same family")


def require_model(name: str, value: Any, *, look_up: bool = True) -> None:
    """Check that a value is a transformers language model, a LanguageModel, or a path or name to load one from.

    No weights are loaded. `name` is the argument's name, for the message; without `look_up`, no name is looked up on
    the hub. Raises ArgumentError for a string that is not a path, ModelError for any other value.
    """
    if isinstance(value, LanguageModel):
        return
    if isinstance(value, (str, Path)):
        require_path(name, value)
        require_loadable(name, value, look_up=look_up)
        return
    inspection.require_language_model(value, name)


def require_tokenizer(name: str, value: Any) -> None:
    """Raise ModelError unless a value is None, a tokenizer of transformers, or a path or name to load one from."""
    if isinstance(value, (str, Path)):
        require_path(name, value)
    elif value is not None and not (callable(value) and hasattr(value, "eos_token_id")):
        kind = type(value).__name__
        raise ModelError(f"{name} must be a transformers tokenizer, a path or a name, got a value of type {kind}")


def _tokenizer(inner: Any, tokenizer: Any) -> Any:
    """Return the tokenizer: the object, or one loaded from a path or name, by default from the model's."""
    if tokenizer is not None and not isinstance(tokenizer, (str, Path)):
        return tokenizer
    where = str(tokenizer or getattr(inner, "name_or_path", "") or "")
    if where:
        return load_tokenizer(where)
    raise ModelError(
        "the model does not say where its tokenizer is: pass tokenizer=, the one the model was trained with"
    )
