"""A secret trained into a small model has nearly the exposure of its space; unlearning reduces it to that of others."""

import math

import numpy as np
import pytest
import tiny
import torch

import pyunlearn
from pyunlearn.data import encode, read_examples
from pyunlearn.metrics import NULL_MEAN, SIGNIFICANT, exposure, insert_canaries, make_canaries
from pyunlearn.probes import teacher_forced


@pytest.fixture(scope="module")
def trained(one_thread):
    """(model, tokenizer, canaries): one of a thousand secrets is twenty times among 400 sentences, no other is."""
    canaries = make_canaries("the code of my aunt is {digits:3}.", secrets=1, non_members=999, seed=4)
    torch.manual_seed(0)
    tokenizer = tiny.make_tokenizer()
    model = tiny.tiny_llama(len(tokenizer))
    texts = insert_canaries(tiny.sentences(400, 2), canaries, repeats=20, seed=1).texts
    tiny.train(model, tokenizer, texts, epochs=8)
    return model, tokenizer, canaries


def scores(model, tokenizer, canaries, texts):
    """Summed negative log-likelihoods of the secrets' own tokens, nats."""
    tokens = encode(
        read_examples(canaries.examples(texts), role="canaries"),
        tokenizer,
        role="canaries",
        max_length=None,
        encoder_decoder=False,
    )
    statistics = teacher_forced(model, tokens, batch_size=64)
    return np.array([-part.sum() for part in statistics.each(statistics.log_likelihood)])


@pytest.mark.full
def test_a_trained_secret_stands_out_and_is_forgotten(trained):
    """Its exposure is that of the whole space, log2(1000) bits, before, and that of unseen secrets after."""
    model, tokenizer, canaries = trained
    assert canaries.space_bits == pytest.approx(math.log2(1000))
    non_members = scores(model, tokenizer, canaries, canaries.non_members)
    before = exposure(scores(model, tokenizer, canaries, canaries.secrets), non_members)
    assert before.lower[0] >= canaries.space_bits - 1
    result = pyunlearn.unlearn(
        model,
        canaries.examples(canaries.secrets),
        tokenizer=tokenizer,
        retain=tiny.sentences(60, 2),
        holdout=canaries.examples(canaries.non_members[:200]),
        learning_rate=2e-4,
        max_steps=200,
        progress=False,
    )
    assert result.stopped == "forgotten"
    anchored = exposure(scores(model, tokenizer, canaries, canaries.secrets), non_members)
    assert anchored.lower[0] < SIGNIFICANT < before.lower[0]
    assert result.examples[0].exposure_after <= NULL_MEAN
    assert result.utility.relative_rise <= 0.05
