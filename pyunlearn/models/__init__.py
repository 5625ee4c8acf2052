"""Everything that knows how a transformers model is put together."""

from pyunlearn.models.inspection import (
    context_length,
    decoder_start_id,
    is_encoder_decoder,
    require_language_model,
    unwrapped,
    vocabulary_of,
)
from pyunlearn.models.likelihood import Likelihood, head_problem, inputs_of
from pyunlearn.models.loading import encoded, load, load_tokenizer, load_weights, opened, tokenizer_of

__all__ = [
    "Likelihood",
    "context_length",
    "decoder_start_id",
    "encoded",
    "head_problem",
    "inputs_of",
    "is_encoder_decoder",
    "load",
    "load_tokenizer",
    "load_weights",
    "opened",
    "require_language_model",
    "tokenizer_of",
    "unwrapped",
    "vocabulary_of",
]
