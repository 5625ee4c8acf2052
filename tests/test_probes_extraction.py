"""Extraction by decoding agrees with decoding one token after another, and with the teacher-forced pass."""

import numpy as np
import pytest
import torch
from test_probes_teacher_forced import KINDS, made

from pyunlearn.data import Tokens
from pyunlearn.errors import ArgumentError
from pyunlearn.metrics import extraction_strength
from pyunlearn.probes import greedy_extractor, greedy_rests, teacher_forced

LENGTH = 7


def step(model, t, given):
    """The model's first choice after a prompt and `given`, from its own logits."""
    with torch.no_grad():
        if t.decoder is not None:
            so_far = [model.config.decoder_start_token_id, *t.decoder[: t.first], *given]
            return int(
                model(input_ids=torch.tensor([t.ids]), decoder_input_ids=torch.tensor([so_far])).logits[0, -1].argmax()
            )
        return int(model(input_ids=torch.tensor([[*t.ids[: t.first], *given]])).logits[0, -1].argmax())


def partly_extractable(kind):
    """A random model, and texts that it would write itself from some token on, a different one for each."""
    model, tokenizer, tokens = made(kind)
    texts = []
    for wrong, t in enumerate(tokens[:6]):
        given = []
        for k in range(LENGTH):
            choice = step(model, t, given)
            given.append(5 + (choice + 1) % 7 if k == wrong - 1 else choice)  # wrong once; nowhere in the first
        ids, decoder = (
            (t.ids, (*t.decoder[: t.first], *given)) if t.decoder is not None else ((*t.ids[: t.first], *given), None)
        )
        if tokenizer.eos_token_id not in given:
            texts.append(Tokens(ids, t.first, decoder))
    return model, tokenizer, texts


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_finds_the_strength_of_one_teacher_forced_pass(kind):
    """Every prefix from the shortest on, of causal models and encoder-decoders, padded together.

    Some texts are written from the prompt alone, some never.
    """
    model, tokenizer, tokens = partly_extractable(kind)
    passed = teacher_forced(model, tokens)
    expected = [extraction_strength(part == 0) for part in passed.each(passed.rank)]
    assert len(set(expected)) > 2
    continue_from = greedy_extractor(model, tokens, tokenizer=tokenizer, batch_size=4)
    written = np.array([continue_from(np.full(len(tokens), k)) for k in range(LENGTH + 1)])  # (prefixes, texts)
    assert (1 - written.argmax(axis=0) / LENGTH).tolist() == pytest.approx(expected)
    assert (np.diff(written.astype(int), axis=0) >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_rests_are_written_token_by_token_after_every_prefix(kind):
    """After each number of true tokens the argmax, one at a time and alone."""
    model, tokenizer, tokens = partly_extractable(kind)
    tokens, n = tokens[:3], 2
    decoded = greedy_rests(model, tokens, tokenizer=tokenizer, n=n, batch_size=5)
    eos = tokenizer.eos_token_id
    for t, rests in zip(tokens, decoded, strict=True):
        expected = []
        for k in range(LENGTH - n):
            given = list(t.scored[:k])
            while len(given) < LENGTH and eos not in given[k:]:
                given.append(step(model, t, given))
            expected.append(tuple(given[k:]))
        assert rests == expected
    assert all(rest == tokens[0].scored[k:] for k, rest in enumerate(decoded[0]))
    assert any(rest != t.scored[k:] for t, rests in zip(tokens, decoded, strict=True) for k, rest in enumerate(rests))


def test_texts_without_an_n_gram_to_find_are_refused():
    """A text of n tokens has no place to begin."""
    model, tokenizer, tokens = made("plain")
    with pytest.raises(ArgumentError, match=r"longer than n = 500 scored tokens: not so text\(s\) \[0, 1"):
        greedy_rests(model, tokens, tokenizer=tokenizer, n=500)
