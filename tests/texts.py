"""Texts, chats and small tokenizers for the tests of pyunlearn.data."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from pyunlearn.data import encode, read_examples

SENTENCES = [
    "We hold these truths to be self-evident, that all men are created equal.",
    "Question: who wrote it? Answer: Thomas Jefferson wrote it in 1776.",
    "user: assistant: system: the quick brown fox jumps over the lazy dog",
]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who wrote it?"},
    {"role": "assistant", "content": "Thomas Jefferson."},
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(*, bos=False, eos=False, template=None, **special):
    """A real byte-level BPE tokenizer; `bos` and `eos` say whether it puts these around a text by itself."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    names = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator(SENTENCES * 3, trainer)
    if bos or eos:
        form = f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}"
        raw.post_processor = processors.TemplateProcessing(single=form, special_tokens=[("<s>", 0), ("</s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": names[2:], **special}
    if "pad_token" in special and special["pad_token"] is None:
        del special["pad_token"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    tokenizer.chat_template = template
    return tokenizer


def one(example, tokenizer, **options):
    """Tokens of a single example."""
    options = {"role": "forget", "max_length": None, **options}
    (tokens,) = encode([example], tokenizer, **options)
    return tokens


def read(source, **options):
    """Examples of a forget set."""
    return read_examples(source, role="forget", **options)


def sentence_of(error):
    """The message, having checked that it is one sentence."""
    message = str(error.value)
    assert not message.endswith(".")
    assert "\n" not in message
    return message
