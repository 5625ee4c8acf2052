"""Batches: padded on the right, with the position that predicts each scored token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyunlearn.data import TokenBatch, Tokens, batches, collate
from pyunlearn.errors import ArgumentError

PAD = START = 1  # also an ordinary token below: the end of text is often all three
ids = st.lists(st.integers(0, 3), min_size=2, max_size=9).map(tuple)
causal = ids.flatmap(lambda i: st.builds(Tokens, st.just(i), st.integers(1, len(i) - 1)))
paired = st.tuples(ids, ids).flatmap(lambda p: st.builds(Tokens, st.just(p[0]), st.integers(0, 1), st.just(p[1])))


@settings(deadline=None, max_examples=50)
@given(st.lists(causal, min_size=1, max_size=5))
def test_a_causal_batch_holds_the_targets_and_never_padding(tokens):
    """Row r of example b predicts what stands right after it; eos = pad changes nothing."""
    batch = collate(tokens, pad_id=PAD)
    check(tokens, batch)
    width = batch.ids.shape[1]
    flat_ids, flat_mask = batch.ids.flatten(), batch.attention_mask.flatten()
    assert torch.equal(batch.rows // width, batch.example)
    assert torch.equal(flat_ids[batch.rows + 1], batch.targets)
    assert flat_mask[batch.rows].all()
    assert flat_mask[batch.rows + 1].all()
    assert batch.decoder_ids is None


@settings(deadline=None, max_examples=50)
@given(st.lists(paired, min_size=1, max_size=5))
def test_an_encoder_decoder_batch_shifts_the_decoder_right(tokens):
    """Position j of the decoder reads token j - 1 and predicts token j."""
    batch = collate(tokens, pad_id=PAD, decoder_start_id=START)
    check(tokens, batch)
    width = batch.decoder_ids.shape[1]
    assert width == max(len(t.decoder) for t in tokens)
    assert torch.equal(batch.rows // width, batch.example)
    for b, t in enumerate(tokens):
        assert batch.decoder_ids[b].tolist()[: len(t.decoder)] == [START, *t.decoder[:-1]]
        positions = (batch.rows[batch.example == b] % width).tolist()
        assert positions == list(range(t.first, len(t.decoder)))


def check(tokens, batch):
    """What holds for both kinds: un-flattened, the batch is the tokens again."""
    assert batch.ids.shape == batch.attention_mask.shape == (len(tokens), max(len(t.ids) for t in tokens))
    assert {t.dtype for t in vars(batch).values() if t is not None} == {torch.int64}
    assert batch.counts.tolist() == [len(t.scored) for t in tokens]
    assert torch.equal(batch.rows, batch.rows.unique(sorted=True))
    for b, t in enumerate(tokens):
        assert tuple(batch.targets[batch.example == b].tolist()) == t.scored
        assert tuple(batch.ids[b, : len(t.ids)].tolist()) == t.ids
        assert batch.attention_mask[b].tolist() == [1] * len(t.ids) + [0] * (batch.ids.shape[1] - len(t.ids))
        assert (batch.ids[b, len(t.ids) :] == PAD).all()


@settings(deadline=None, max_examples=50)
@given(st.lists(causal, max_size=12), st.integers(1, 5))
def test_batches_hold_every_example_once_and_the_longest_first(tokens, batch_size):
    """The indices put results back in order, and the batches are the same in every run."""
    out = list(batches(tokens, batch_size, pad_id=PAD))
    order = [i for indices, _ in out for i in indices]
    assert sorted(order) == list(range(len(tokens)))
    assert [len(tokens[i]) for i in order] == sorted(map(len, tokens), reverse=True)
    assert all(len(indices) == batch_size for indices, _ in out[:-1])
    for indices, batch in out:
        check([tokens[i] for i in indices], batch)
    assert order == [i for indices, _ in batches(tokens, batch_size, pad_id=PAD) for i in indices]


def test_a_batch_moves_as_a_whole():
    """Every tensor of it, and what is absent stays absent."""
    batch = collate([Tokens((1, 2), 1)], pad_id=0)
    moved = batch.to("meta")
    assert isinstance(moved, TokenBatch)
    assert {t.device.type for t in vars(moved).values() if t is not None} == {"meta"}
    assert moved.decoder_ids is None
    assert torch.equal(batch.to("cpu").ids, batch.ids)


def test_a_batch_that_makes_no_sense_is_refused():
    """Nothing in it, two kinds in it, or the wrong start."""
    one_kind, other = Tokens((1, 2), 1), Tokens((1,), 0, (2,))
    for tokens, start in ([one_kind, other], 0), ([one_kind], 0), ([other], None):
        with pytest.raises(ArgumentError, match="decoder_start_id must be given with"):
            collate(tokens, pad_id=0, decoder_start_id=start)
    with pytest.raises(ArgumentError, match="at least one example"):
        collate([], pad_id=0)
    with pytest.raises(ArgumentError, match="batch_size must be a whole number, 1 or more, got 0"):
        batches([one_kind], 0, pad_id=0)
