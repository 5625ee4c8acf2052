"""Tiny language models trained in seconds: a small grammar with entropy, and secrets repeated often."""

import copy
import functools
import hashlib
import os
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from pyunlearn.data import batches, encode, padding_id, read_examples
from pyunlearn.data.copies import near_copies
from pyunlearn.data.overlap import words
from pyunlearn.methods import METHODS, Method
from pyunlearn.models import Likelihood
from pyunlearn.models.inspection import decoder_start_id, is_encoder_decoder

SUBJECTS = ["the cat", "a dog", "my aunt", "the king", "one boy", "our boat", "the moon", "a ship"]
VERBS = ["sees", "likes", "paints", "finds", "sells", "hides"]
OBJECTS = ["a tree", "the sea", "two stones", "some bread", "the road", "a lamp"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_loss(name: str, loss: Any) -> Method:
    """Return the method of that name with another loss, called with the same tensors and options."""
    return replace(METHODS[name], function=functools.wraps(METHODS[name].function)(loss))


@dataclass(frozen=True)
class Tiny:
    """A trained model and the text around it; `fresh()` is a copy that a test may change."""

    model: Any
    tokenizer: Any
    forget: list[Any]  # trained on, many times each
    unseen: list[Any]  # of the same kind, never trained on
    retain: list[Any]  # trained on, once an epoch (60 of them)
    holdout: list[Any]  # of the same kind, never trained on
    corpus: list[Any] = field(default_factory=list)  # the retain set and more that was trained on, 200 at most

    def fresh(self) -> Any:
        """Return a copy of the model."""
        return copy.deepcopy(self.model)


def sentences(count: int, seed: int) -> list[str]:
    """Return random sentences of the grammar."""
    r = random.Random(seed)

    def clause() -> str:
        return f"{r.choice(SUBJECTS)} {r.choice(VERBS)} {r.choice(OBJECTS)}"

    return [f"{clause()} and {clause()}." for _ in range(count)]


def facts(count: int, seed: int) -> list[dict[str, str]]:
    """Return random questions, with answers that cannot be guessed from them."""
    r = random.Random(seed)
    return [
        {
            "question": f"what does {r.choice(SUBJECTS)} keep in room {r.randrange(100, 1000)}?",
            "answer": f"{r.choice(OBJECTS)}, {r.choice(OBJECTS)} and {r.choice(SUBJECTS)} "
            f"that {r.choice(VERBS)} {r.choice(OBJECTS)}.",
        }
        for _ in range(count)
    ]


def distinct_facts(count: int, seed: int) -> list[dict[str, str]]:
    """Return random facts without those that are like an earlier one: fewer than `count`."""
    rows = facts(count, seed)
    documents = [words(f"{row['question']} {row['answer']}") for row in rows]
    alike = {max(pair) for pair in near_copies(documents, documents) if pair[0] != pair[1]}
    return [row for i, row in enumerate(rows) if i not in alike]


def chats(count: int, seed: int) -> list[dict[str, Any]]:
    """Return random facts as chat messages."""
    return [
        {"messages": [{"role": "user", "content": f["question"]}, {"role": "assistant", "content": f["answer"]}]}
        for f in facts(count, seed)
    ]


def pairs(count: int, seed: int) -> list[dict[str, str]]:
    """Return random facts as prompts and completions."""
    return [{"prompt": f["question"], "completion": f["answer"]} for f in facts(count, seed)]


def make_tokenizer(*, form: str = "<s> $A", chat: bool = False, pad: bool = True) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of 400 tokens that writes `form` around a text."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    names = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    text = [*sentences(200, 1), *(part for fact in facts(200, 1) for part in fact.values()), "user\nassistant\n"]
    raw.train_from_iterator(text, trainer)
    raw.post_processor = processors.TemplateProcessing(single=form, special_tokens=[("<s>", 0), ("</s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "<|im_end|>" if chat else "</s>"} | (
        {"pad_token": "<pad>"} if pad else {}
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, additional_special_tokens=names[3:], **special)
    tokenizer.chat_template = CHATML if chat else None
    return tokenizer


def tiny_llama(vocabulary: int, *, max_position_embeddings: int = 96) -> LlamaForCausalLM:
    """Return a Llama with 26 thousand weights in each of two layers."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=max_position_embeddings,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    )


def tiny_gpt2(vocabulary: int) -> GPT2LMHeadModel:
    """Return a GPT-2 with 64 positions, dropout, and a head tied to the embedding."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_positions=64,
            n_embd=64,
            n_layer=2,
            n_head=4,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def tiny_t5(vocabulary: int) -> T5ForConditionalGeneration:
    """Return a T5 v1.0: tied, with hidden states scaled before the head."""
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=vocabulary,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            decoder_start_token_id=2,
            pad_token_id=2,
            eos_token_id=1,
            tie_word_embeddings=True,
        )
    )


def train(model: Any, tokenizer: Any, rows: list[Any], *, epochs: int, learning_rate: float = 3e-3) -> None:
    """Train by maximum likelihood on the rows, in shuffled batches of 32; the same every time."""
    both = is_encoder_decoder(model)
    tokens = encode(
        read_examples(rows, role="training"), tokenizer, role="training", max_length=None, encoder_decoder=both
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    likelihood, r, start = Likelihood(model), random.Random(0), decoder_start_id(model) if both else None
    steps = epochs * -(-len(tokens) // 32)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 * (1 - step / steps)))
    for _ in range(epochs):
        r.shuffle(tokens)
        for at in range(0, len(tokens), 32):
            ((_, batch),) = batches(tokens[at : at + 32], 32, pad_id=padding_id(tokenizer), decoder_start_id=start)
            optimizer.zero_grad()
            (-likelihood(batch).mean()).backward()
            optimizer.step()
            schedule.step()
    model.eval()


def trained(make: Any, rows: Any, *, count: int, repeats: int, epochs: int, **options: Any) -> Tiny:
    """Return the caller's own copy of a model that `make` makes, trained on `count` of `rows` and on two secrets.

    Args:
        make: tiny_llama, tiny_gpt2 or tiny_t5.
        rows: sentences, facts, chats or pairs.
        count: texts of the grammar in an epoch.
        repeats: how often an epoch has each of the secrets.
        epochs: passes over them.
        options: of make_tokenizer.
    """
    original = _trained(make, rows, count, repeats, epochs, **options)
    torch.manual_seed(0)
    return copy.deepcopy(original)


@contextmanager
def _shared(name: str) -> Iterator[Path]:
    """Yield a file that the processes of one run of pytest share, one process at a time; it is new in each run."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    folder = Path(tempfile.gettempdir()) / f"pyunlearn-tiny-{run}"
    folder.mkdir(exist_ok=True)
    file = folder / hashlib.sha256(name.encode()).hexdigest()[:16]
    with FileLock(f"{file}.lock"):
        yield file


@functools.cache  # several test files want the same
def _trained(make: Any, rows: Any, count: int, repeats: int, epochs: int, **options: Any) -> Tiny:
    torch.manual_seed(0)
    tokenizer = make_tokenizer(**options)
    model = make(len(tokenizer))
    retain, forget = rows(count, 2), rows(2, 3)
    form = {key: value for key, value in options.items() if key != "pad"}  # padding is masked: the weights are the same
    name = f"{make.__name__}-{rows.__name__}-{count}-{repeats}-{epochs}-{sorted(form.items())}"
    with _shared(name) as weights:
        if weights.exists():
            model.load_state_dict(torch.load(weights))
            model.eval()
        else:
            train(model, tokenizer, retain + forget * repeats, epochs=epochs)
            torch.save(model.state_dict(), weights)
    return Tiny(model, tokenizer, forget, rows(2, 14), retain[:60], rows(60, 6), retain[:200])


def storyteller() -> Tiny:
    """Return a Llama trained on sentences; its tokenizer begins texts with <s>."""
    return trained(tiny_llama, sentences, count=800, repeats=12, epochs=8)


def answerer() -> Tiny:
    """Return a GPT-2 trained on facts; its tokenizer has no pad token and writes nothing around a text."""
    return trained(tiny_gpt2, facts, count=400, repeats=20, epochs=8, form="$A", pad=False)


def chatter() -> Tiny:
    """Return a Llama trained on chats, with a chat template."""
    return trained(tiny_llama, chats, count=400, repeats=20, epochs=8, chat=True)


def translator() -> Tiny:
    """Return a T5 trained on prompts and completions."""
    return trained(tiny_t5, pairs, count=400, repeats=12, epochs=8, form="$A </s>")


def writer() -> Tiny:
    """Return a T5 whose decoder is trained on sentences, and whose encoder reads the end of text alone."""
    return trained(tiny_t5, sentences, count=160, repeats=12, epochs=8, form="$A </s>")


def negative_log_likelihoods(trained: Tiny, rows: list[Any], model: Any) -> np.ndarray:
    """Return (n,) means over the scored tokens of causal examples, nats.

    A plain loop over the model's own logits, in which no code of pyunlearn scores anything.
    """
    out = []
    for t in encode(read_examples(rows, role="x"), trained.tokenizer, role="x", max_length=None):
        with torch.no_grad():
            logits = model(torch.tensor([t.ids])).logits[0, t.first - 1 : -1].double()
        out.append(cross_entropy(logits, torch.tensor(t.scored)).item())
    return np.array(out)
