"""The methods of whole distributions, each against its formula in float64."""

import math

import pytest
import tiny
import torch

from pyunlearn.data import Tokens, collate
from pyunlearn.errors import ArgumentError, OutputError
from pyunlearn.methods import METHODS, Multiplier, ceu, kl, pdu, undial
from pyunlearn.models import Likelihood
from pyunlearn.models.distributions import Distributions, Head
from pyunlearn.unlearning.hidden_cache import HiddenStateCache

TEXTS = [Tokens((5, 6, 7, 8, 9), 2), Tokens((3, 4, 12, 30, 31, 32, 33), 4), Tokens((9, 1, 2), 1), Tokens((4, 8), 1)]


def soft_cross_entropy(q, z):
    """(T,) -sum over v of q log softmax(z), where q is 0 too."""
    return -(q * torch.log_softmax(z, -1)).sum(-1)


def struck_out(z, tokens):
    """(T, V) the distribution without the tokens."""
    p = torch.softmax(z.detach(), -1).scatter(1, tokens[:, None], 0.0)
    return p / p.sum(-1, keepdim=True)


def lowered(y, tokens, by):
    """(T, V) the reference's distribution with the tokens' logits lowered."""
    y = y.detach().clone()
    y[torch.arange(len(tokens)), tokens] -= by
    return torch.softmax(y, -1)


def divergence(y, z):
    """(T,) KL(softmax(y) || softmax(z))."""
    q = torch.softmax(y.detach(), -1)
    return (q * (q.log() - torch.log_softmax(z, -1))).sum(-1)


FORMULAS = {  # of one text alone: its logits (T, V) under model and reference, its tokens (T,)
    "ceu": lambda z, y, t: soft_cross_entropy(struck_out(z, t), z)[1 if len(t) > 1 else 0 :].mean(),
    "undial": lambda z, y, t: soft_cross_entropy(lowered(y, t, 10.0), z).mean(),
    "kl": lambda z, y, t: -divergence(y, z).mean(),
    "pdu": lambda z, y, t: (z.amax(-1) - z.mean(-1)).square().mean(),
}


def spread(model, seed):
    """The model in float64 with logits that differ by a few nats."""
    torch.manual_seed(seed)
    for p in model.parameters():
        p.data.add_(0.3 * torch.randn_like(p)).mul_(2)
    return model.double().eval()


def logits_of(model, t):
    """(T, V) of one text by itself, by the model's own forward pass."""
    if t.decoder is None:
        return model(torch.tensor([t.ids])).logits[0, t.first - 1 : -1]
    start = torch.tensor([[model.config.decoder_start_token_id, *t.decoder[:-1]]])
    return model(input_ids=torch.tensor([t.ids]), decoder_input_ids=start).logits[0, t.first :]


def causal():
    return spread(tiny.tiny_llama(60), 0), spread(tiny.tiny_llama(60), 1), TEXTS, None


def encoder_decoder():
    texts = [Tokens(t.ids[: t.first + 1], min(1, len(t.scored) - 1), t.scored) for t in TEXTS]
    return spread(tiny.tiny_t5(60), 0), spread(tiny.tiny_t5(60), 1), texts, 2


def own_logits(model):
    """The same model, whose head is no plain linear layer."""
    kind = type("Odd", (torch.nn.Linear,), {})
    model.lm_head.__class__ = kind
    return model


def on_the_left(batch):
    """The same batch, padded on the left."""
    width = batch.ids.shape[1]
    moves = width - batch.attention_mask.sum(1)
    ids, mask = (
        torch.stack([row.roll(int(n)) for row, n in zip(x, moves, strict=True)])
        for x in (batch.ids, batch.attention_mask)
    )
    return type(batch)(**{**vars(batch), "ids": ids, "attention_mask": mask, "rows": batch.rows + moves[batch.example]})


def loss_of(name, model, reference, batch):
    """(B,) losses of a method on whole distributions."""
    tensors = {"model": model, "reference": reference, "targets": batch.targets}
    return METHODS[name].loss(tensors | {"example": batch.example, "counts": batch.counts}, {})


@pytest.mark.parametrize("kind", ["right", "left", "encoder_decoder", "own_logits"])
@pytest.mark.parametrize("name", FORMULAS)
def test_a_loss_is_its_formula(name, kind):
    """Value and every parameter's gradient are those of each text alone, without padding and prompt, in float64."""
    model, other, texts, start = encoder_decoder() if kind == "encoder_decoder" else causal()
    wanted = sum(FORMULAS[name](logits_of(model, t), logits_of(other, t), torch.tensor(t.scored)) for t in texts)
    gradients = torch.autograd.grad(wanted, list(model.parameters()), allow_unused=True)
    if kind == "own_logits":
        model, other = own_logits(model), own_logits(other)
    batch = collate(texts, pad_id=0, decoder_start_id=start)
    batch = on_the_left(batch) if kind == "left" else batch
    likelihood = Likelihood(model)
    if kind == "own_logits":
        with pytest.warns(UserWarning, match="uses the model's own logits"):
            distributions = likelihood.distributions(batch), Likelihood(other).distributions(batch)
    else:
        distributions = likelihood.distributions(batch), Likelihood(other).distributions(batch)
    assert likelihood.fused is (kind != "own_logits")
    losses = loss_of(name, *distributions, batch)
    assert losses.shape == (len(texts),)
    digits = (
        1e-4 if kind == "left" else 1e-10
    )  # rotary angles are float32: a text moved to the right is not quite the same
    assert losses.sum().item() == pytest.approx(wanted.item(), rel=digits)
    computed = torch.autograd.grad(losses.sum(), list(model.parameters()), allow_unused=True)
    for mine, right in zip(computed, gradients, strict=True):
        assert (mine is None) == (right is None)
        if mine is not None:
            assert (mine - right).abs().max() <= digits * max(1.0, float(right.abs().max()))


# ---------------------------------------------------------------- the traps of public code


def test_divergences_are_not_averaged_over_padding_and_prompts():
    """UNDIAL and KL are means over scored tokens: a long prompt or a long neighbour changes neither.

    Public code divides by all positions, and reads UNDIAL's label -100 as the 100th token from the end.
    """
    model, other = (spread(tiny.tiny_llama(60), seed) for seed in (0, 1))
    long = Tokens(tuple(range(40)), 30)
    for name in ("undial", "kl"):

        def losses(texts, name=name):
            batch = collate(texts, pad_id=0)
            distributions = Likelihood(model).distributions(batch), Likelihood(other).distributions(batch)
            return loss_of(name, *distributions, batch)

        together = losses([*TEXTS, long])
        torch.testing.assert_close(together[:-1], losses(TEXTS), rtol=1e-6, atol=0.0)
        every = torch.log_softmax(logits_of(model, Tokens(long.ids, 1)), -1)  # what the trap would take the mean of
        assert len(every) == 39
        alone = losses([long])
        torch.testing.assert_close(together[-1:], alone, rtol=1e-6, atol=0.0)
        part = FORMULAS[name](logits_of(model, long), logits_of(other, long), torch.tensor(long.scored))
        whole = Tokens(long.ids, 1)
        all_of_it = FORMULAS[name](logits_of(model, whole), logits_of(other, whole), torch.tensor(whole.scored))
        assert alone.item() == pytest.approx(part.item(), rel=1e-6)
        assert abs(part.item() - all_of_it.item()) > 0.01 * abs(part.item())


def test_the_flattened_logits_are_those_that_predict_the_forget_tokens():
    """PDU's are one position before each token; public code masks them unshifted, and flattens those after the text."""
    model = spread(tiny.tiny_llama(60), 0)
    t = Tokens(tuple(range(20)), 12)
    z = model(torch.tensor([t.ids])).logits[0]
    batch = collate([t], pad_id=0)
    loss = loss_of("pdu", Likelihood(model).distributions(batch), None, batch)
    margins = (z.amax(-1) - z.mean(-1)).square()
    assert loss.item() == pytest.approx(margins[11:19].mean().item(), rel=1e-9)
    assert abs(loss.item() - margins[12:20].mean().item()) > 1e-3


# ---------------------------------------------------------------- one by one


def rows(logits, dtype=torch.float32):
    """Distributions with these logits (N, V), by an identity for a head."""
    z = torch.as_tensor(logits, dtype=dtype)
    return Distributions(z.clone().requires_grad_(), Head(torch.eye(z.shape[1], dtype=dtype), None, 1.0, None))


@pytest.mark.parametrize("certainty", [1.0, 10.0, 16.0, 20.0, 40.0, 200.0])
def test_a_memorized_token_has_a_gradient_and_the_right_one(certainty):
    """CE-U in float32 is CE-U in float64, also where 1 - p is less than float32 can tell from 0.

    A factor p / (1 - p) would be infinite there, or wrong in its first digit.
    """
    z = [[certainty, 1.0, 0.0, -1.0, 0.5], [0.0, certainty, 0.3, 0.2, 0.1]]
    targets, example, counts = torch.tensor([0, 1]), torch.tensor([0, 0]), torch.tensor([2])
    results = {}
    for dtype in (torch.float32, torch.float64):
        model = rows(z, dtype)
        loss = ceu(model, targets, example, counts, skip=0)
        results[dtype] = loss.item(), torch.autograd.grad(loss, model.states)[0]
    wide = torch.tensor(z, dtype=torch.float64, requires_grad=True)
    right = FORMULAS["ceu"](torch.cat([wide[:1], wide]), None, torch.tensor([0, 0, 1]))
    (gradient,) = torch.autograd.grad(right, wide)
    for dtype, digits in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        value, mine = results[dtype]
        assert value == pytest.approx(right.item(), rel=digits)
        torch.testing.assert_close(mine.double(), gradient, rtol=0.0, atol=digits)
    assert gradient.abs().sum(1).min() > 0.2


def test_ceu_leaves_out_the_first_tokens_but_never_all():
    """It skips `skip` tokens of each text, but not the only one of a text of one token."""
    model = rows(torch.randn(6, 7, generator=torch.Generator().manual_seed(0)), torch.float64)
    targets, example, counts = torch.arange(6), torch.tensor([0, 0, 0, 1, 2, 2]), torch.tensor([3, 1, 2])
    each = ceu(model, targets, torch.arange(6), torch.ones(6, dtype=torch.int64), skip=0, reduction="none")
    for skip, indices in (
        (0, [(0, 1, 2), (3,), (4, 5)]),
        (1, [(1, 2), (3,), (5,)]),
        (2, [(2,), (3,), (5,)]),
        (9, [(2,), (3,), (5,)]),
    ):
        losses = ceu(model, targets, example, counts, skip=skip, reduction="none")
        torch.testing.assert_close(losses, torch.stack([each[list(p)].mean() for p in indices]))

    with pytest.raises(ArgumentError, match="skip must be a whole number of tokens, 0 or more, got -1"):
        ceu(model, targets, example, counts, skip=-1)


def test_undial_ends_where_the_model_is_the_adjusted_reference():
    """Its gradient is 0 there, and its value the entropy of that distribution."""
    y = torch.randn(3, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets, example, counts = torch.tensor([4, 0, 8]), torch.zeros(3, dtype=torch.int64), torch.tensor([3])
    q = lowered(y, targets, 2.0)
    model = rows(q.log(), torch.float64)
    loss = undial(model, rows(y, torch.float64), targets, example, counts, beta=2.0)
    assert loss.item() == pytest.approx(-(q * q.log()).sum(-1).mean().item(), rel=1e-12)
    assert torch.autograd.grad(loss, model.states)[0].abs().max() < 1e-12


def test_kl_goes_away_or_toward():
    """One is minus the other; another direction is refused."""
    g = torch.Generator().manual_seed(0)
    model, other = (rows(torch.randn(4, 9, generator=g), torch.float64) for _ in range(2))
    inputs = (model, other, torch.tensor([1, 2, 3, 4]), torch.tensor([0, 0, 1, 1]), torch.tensor([2, 2]))
    toward = kl(*inputs, direction="toward", reduction="none")
    assert (toward > 0).all()
    torch.testing.assert_close(kl(*inputs, reduction="none"), -toward)
    with pytest.raises(ArgumentError, match='direction must be "away" or "toward", got \'up\''):
        kl(*inputs, direction="up")


def test_flat_logits_are_the_end_of_pdu():
    """Loss and gradient are 0 for logits that are all the same, however large."""
    model = rows(torch.full((2, 9), 70.0), torch.float64)
    loss = pdu(model, torch.tensor([0, 1]), torch.tensor([1, 1]))
    assert loss.item() == 0
    assert torch.autograd.grad(loss, model.states)[0].abs().max() == 0


def test_the_multiplier_follows_the_constraint():
    """It rises by step size times the excess and falls by the room, to 0 at most, after the warm-up; not on NaN."""
    m = Multiplier(1.0, step_size=2.0, bound=3.0, warmup=1)
    seen = []
    for loss in (9.0, 4.0, 3.0, 2.5, math.nan, 0.0, 3.5):
        m.update(loss)
        seen.append(m.value)
    assert seen == [1.0, 3.0, 3.0, 2.0, 2.0, 0.0, 1.0]
    with pytest.raises(ArgumentError, match=r"PDU's multiplier needs a number for its step_size, 0 or more .* got -1"):
        Multiplier(1.0, step_size=-1, bound=3.0, warmup=0)


# ---------------------------------------------------------------- the cache of a reference model


def test_cached_states_come_from_memory_or_a_file(tmp_path, monkeypatch):
    """Texts are read in any order, in the states' own dtype; a trained head is copied, a frozen one is not."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    states = torch.randn(6, 4).bfloat16()
    weight = torch.randn(9, 4, requires_grad=True)
    sizes = {7: 2, 3: 1, 5: 3}
    for head in (Head(weight, None, 1.0, None), Head(weight.detach(), None, 1.0, None)):
        for in_memory in (0, 1 << 20):
            parts = iter(
                [
                    ([5, 7], Distributions(torch.cat([states[3:], states[:2]]), head)),
                    ([3], Distributions(states[2:3], head)),
                ]
            )
            cache = HiddenStateCache(parts, sizes, torch.device("cpu"), in_memory)
            distributions = cache.at([3, 5])
            assert torch.equal(distributions.states, states[2:])
            assert torch.equal(cache.at([7]).states, states[:2])
            assert (distributions.head.weight.data_ptr() == weight.data_ptr()) is not head.weight.requires_grad
            assert not distributions.head.weight.requires_grad
            moved, head.weight.data = head.weight.data, torch.zeros(1, 1)  # as .to(another device) does to a model
            assert torch.equal(cache.at([7]).head.weight, moved)
            head.weight.data = moved
            assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("pyunlearn.unlearning.hidden_cache.shutil.disk_usage", lambda _: type("Usage", (), {"free": 3}))
    with pytest.raises(OutputError, match=r"states of these texts take 0.0 GB, and .* has 0.0 GB: give fewer"):
        HiddenStateCache(iter([([7], Distributions(states[:2], head))]), sizes, torch.device("cpu"), 0)
