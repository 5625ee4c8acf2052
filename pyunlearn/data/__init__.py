"""Turn texts, files and datasets into examples, examples into tokens, and tokens into batches."""

from pyunlearn.data.batching import TokenBatch, batches, collate
from pyunlearn.data.comparison import check_texts, score_note
from pyunlearn.data.examples import Example, Message, read_examples
from pyunlearn.data.tokens import Tokens, encode, padding_id

__all__ = [
    "Example",
    "Message",
    "TokenBatch",
    "Tokens",
    "batches",
    "check_texts",
    "collate",
    "encode",
    "padding_id",
    "read_examples",
    "score_note",
]
