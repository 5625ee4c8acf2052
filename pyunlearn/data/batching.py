"""Padded batches of tokens: Tokens -> TokenBatch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyunlearn.data.tokens import Tokens
from pyunlearn.errors import ArgumentError
from pyunlearn.options import Whole, require


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Batch of B examples, padded on the right, and the n scored tokens among them, by example, then by position.

    ids, attention_mask  (B, T) int64
    rows                 (n,) int64: the position whose output predicts the token, in the flattened (B * T), or with an
                         encoder-decoder model in the decoder's (B * T')
    targets              (n,) int64: the token to score there
    example              (n,) int64: index of its example, 0 to B - 1
    counts               (B,) int64: scored tokens of each example, at least 1
    decoder_ids          (B, T') int64: the decoder's input, already shifted right; None for a causal model
    """

    ids: Tensor
    attention_mask: Tensor
    rows: Tensor
    targets: Tensor
    example: Tensor
    counts: Tensor
    decoder_ids: Tensor | None = None

    def to(self, device: torch.device | str | int) -> TokenBatch:
        """Copy the batch to `device`, without waiting for the copy on the way to a CUDA GPU.

        Elsewhere the copy is waited for: MPS would read memory of the CPU that is already free.
        """
        ahead = torch.device(device).type == "cuda"
        present = {name: tensor for name, tensor in vars(self).items() if tensor is not None}
        return replace(self, **{name: tensor.to(device, non_blocking=ahead) for name, tensor in present.items()})


def collate(tokens: Sequence[Tokens], *, pad_id: int, decoder_start_id: int | None = None) -> TokenBatch:
    """Pad examples on the right and list the scored tokens.

    Args:
        tokens: B examples, at least 1, all of a causal model or all of an encoder-decoder.
        pad_id: the token id of padding; any id serves, since padding is neither attended to nor scored.
        decoder_start_id: config.decoder_start_token_id of an encoder-decoder model, and only of one.

    Returns:
        TokenBatch, on the CPU.

    Raises:
        ArgumentError: no example, or a `decoder_start_id` that does not go with the tokens.

    >>> collate([Tokens((5, 6, 7), first=1), Tokens((8, 9), first=1)], pad_id=0).ids
    tensor([[5, 6, 7],
            [8, 9, 0]])
    """
    if not tokens:
        raise ArgumentError("tokens must hold at least one example, and are empty")
    if {t.decoder is not None for t in tokens} != {decoder_start_id is not None}:
        raise ArgumentError("decoder_start_id must be given with tokens of encode(encoder_decoder=True), and no others")
    ids, attention_mask = _padded([t.ids.array for t in tokens], pad_id)
    decoder_ids, width, shift = None, ids.shape[1], 1  # causal: position j - 1 predicts token j
    if decoder_start_id is not None:  # decoder: its input is shifted, so position j predicts token j
        start = np.array([decoder_start_id])
        decoder_ids, _ = _padded([np.concatenate([start, t.written.array[:-1]]) for t in tokens], pad_id)
        width, shift = decoder_ids.shape[1], 0
    counts = _integers([len(t.indices) for t in tokens])
    rows = [b * width - shift + i for b, t in enumerate(tokens) for i in t.indices]
    scored = [t.written.array[t.first :] if t.chosen is None else t.written.array[[*t.chosen]] for t in tokens]
    return TokenBatch(
        ids=ids,
        attention_mask=attention_mask,
        rows=_integers(rows),
        targets=_integers(np.concatenate(scored)),
        example=torch.arange(len(tokens)).repeat_interleave(counts),
        counts=counts,
        decoder_ids=decoder_ids,
    )


def batches(
    tokens: Sequence[Tokens], batch_size: int, *, pad_id: int, decoder_start_id: int | None = None
) -> Iterator[tuple[list[int], TokenBatch]]:
    """Yield (indices into `tokens`, their batch), for evaluation.

    Texts of like length are together, so that there is little padding; the longest come first, so that a lack of memory
    shows at once. The order is the same in every run.

    Args:
        tokens: the examples.
        batch_size: examples in one batch, 1 or more.
        pad_id: as in `collate`.
        decoder_start_id: as in `collate`.

    Raises:
        ArgumentError: a batch size that is no whole number, 1 or more.
    """
    require(Whole(1), batch_size=batch_size)
    order = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))  # stable, so every run has the same batches
    groups = (order[at : at + batch_size] for at in range(0, len(order), batch_size))
    return ((g, collate([tokens[i] for i in g], pad_id=pad_id, decoder_start_id=decoder_start_id)) for g in groups)


def _padded(sequences: Sequence[NDArray[np.integer]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return (B, T) ids and their attention mask."""
    width = max(map(len, sequences))
    rows = np.full((len(sequences), width), pad_id, dtype=np.int64)
    for row, sequence in zip(rows, sequences, strict=True):
        row[: len(sequence)] = sequence
    ids = torch.from_numpy(rows)
    mask = torch.arange(width) < _integers([len(sequence) for sequence in sequences])[:, None]  # (B, T)
    return ids, mask.long()


def _integers(values: Sequence[int] | NDArray[np.integer]) -> Tensor:
    """Return a list as an int64 tensor; NumPy reads them several times faster than torch."""
    return torch.from_numpy(np.array(values, dtype=np.int64))
