"""Names of the tensors that a loss gets, by the parameter names of the methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pyunlearn.methods import Method
from pyunlearn.methods.reduction import token_means


def example_tensors(method: Method, forget: Tensor, lengths: Tensor, reference: Tensor) -> dict[str, Tensor]:
    """Name the tensors of a loss on summed log-likelihoods, (B,), or (B, 2) for the two texts of a pair."""
    if not method.pairs:
        return {method.roles[0]: forget, "lengths": lengths, "reference": reference}
    return {
        "winner": forget[:, 0],
        "winner_reference": reference[:, 0],
        "loser": forget[:, 1],
        "loser_reference": reference[:, 1],
    }


def token_tensors(
    log_likelihood: Tensor, example: Tensor, counts: Tensor, reference: Tensor, **others: Tensor
) -> Mapping[str, Any]:
    """Name the tensors of a loss on single tokens."""
    tensors = {"log_likelihood": log_likelihood, "example": example, "counts": counts, "reference": reference}
    return _TokenTensors(tensors | others)


class _TokenTensors(dict[str, Any]):
    """Tensors by name; the mean token probabilities of a pair are computed on first access."""

    def __missing__(self, name: str) -> Tensor:
        index = ("winner_probability", "loser_probability").index(name)
        probabilities = token_means(
            self["log_likelihood"].exp(), self["example"], self["counts"], self.get("weights")
        ).view(-1, 2)
        self["winner_probability"], self["loser_probability"] = probabilities[:, 0], probabilities[:, 1]
        return probabilities[:, index]
