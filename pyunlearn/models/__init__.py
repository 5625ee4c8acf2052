"""Adapters to transformers: loading, inspection, likelihoods, hidden states and sampling of language models."""

from pyunlearn.models.devices import default_device
from pyunlearn.models.inspection import require_language_model
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.models.likelihood import Likelihood, head_problem, inputs_of
from pyunlearn.models.loading import load, load_tokenizer, load_weights
from pyunlearn.models.scoring import Scorer

__all__ = [
    "LanguageModel",
    "Likelihood",
    "Scorer",
    "default_device",
    "head_problem",
    "inputs_of",
    "load",
    "load_tokenizer",
    "load_weights",
    "require_language_model",
]
