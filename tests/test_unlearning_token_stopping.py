"""Per-token stopping: values of the loss, which tokens are pulled, and how much."""

import pytest
import torch

from pyunlearn.methods import satimp, tnpo, wga, wtnpo
from pyunlearn.methods.match import quantile_targets
from pyunlearn.ops import token_objective
from pyunlearn.unlearning.token_stopping import stopped_by_token

EXAMPLE, COUNTS = torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([4, 2])
LEVEL, LIKELY, UNSEEN = torch.full((6,), -3.0), torch.ones(6), torch.linspace(-6.0, -0.1, 40)
REFERENCE = torch.full((6,), -0.1)


def gradient(function, values, *others, group_size=1):
    """Return the losses and the gradient of their sum."""
    x = torch.tensor(values, requires_grad=True)
    stopped = stopped_by_token(function, UNSEEN, group_size=group_size)
    losses = stopped(x, EXAMPLE, COUNTS, *others, LEVEL, LIKELY)
    losses.sum().backward()
    return losses.detach(), x.grad


def losses_of(method, **options):
    """Return the method's function of log-likelihoods, example, counts and others."""
    return lambda *tensors: method(*tensors, reduction="none", **options)


@pytest.mark.parametrize(("method", "others"), [(wga, ()), (satimp, ()), (tnpo, (REFERENCE,)), (wtnpo, (REFERENCE,))])
def test_the_force_on_a_text_is_that_of_gradient_ascent_and_the_loss_divides_it(method, others):
    """Its tokens above their targets share k / n, in the proportions of the loss; the values are the method's."""
    for values in ([-0.3, -0.5, -0.9, -1.2, -0.4, -0.7], [-2.9, -0.5, -3.4, -1.2, -2.6, -0.7]):
        function = losses_of(method)
        losses, slope = gradient(function, values, *others)
        x = torch.tensor(values, requires_grad=True)
        own = function(x, EXAMPLE, COUNTS, *others)
        assert torch.equal(losses, own.detach())
        above = x.detach() > quantile_targets(x.detach(), EXAMPLE, COUNTS, LEVEL, UNSEEN)
        assert above.any()
        (plain,) = torch.autograd.grad(own.sum(), x)
        for i, n in enumerate(COUNTS.tolist()):
            pulled = above & (i == EXAMPLE)
            assert slope[pulled].sum().item() == pytest.approx(pulled.sum().item() / n)
            torch.testing.assert_close(slope[pulled] / slope[pulled].sum(), plain[pulled] / plain[pulled].sum())
        assert not slope[~above].any()


def test_a_batch_in_several_chunks_has_the_gradients_of_one(one_thread):
    """The head computes a long batch chunk by chunk of whole texts."""
    torch.manual_seed(0)
    example, targets = torch.arange(12).repeat_interleave(50), torch.randint(700, (600,))
    hidden, weight, level = torch.randn(600, 16), torch.randn(700, 16), torch.full((600,), -8.0)
    gradients = []
    for workspace in (1 << 30, 1 << 19):
        h = hidden.clone().requires_grad_()
        loss = stopped_by_token(losses_of(wga), UNSEEN - 4)
        both = level, torch.ones(600)
        token_objective(h, weight, targets, example, loss, *both, examples=12, workspace=workspace).loss.backward()
        gradients.append(h.grad)
    assert gradients[0].any()
    torch.testing.assert_close(*gradients)


def test_a_force_that_has_all_but_faded_is_scaled_up():
    """Weights of 1e-20 divide the same force as weights of 1."""
    values = [-0.3, -0.5, -0.9, -1.2, -0.4, -0.7]

    def faint(log_likelihood, example, counts):
        return 1e-20 * wga(log_likelihood, example, counts, reduction="none")

    torch.testing.assert_close(gradient(faint, values)[1], gradient(losses_of(wga), values)[1])


def test_a_text_at_the_level_of_unseen_text_is_not_pulled():
    """All of its tokens are at their targets, or below; nothing is divided by zero."""
    low = quantile_targets(torch.zeros(6), EXAMPLE, COUNTS, LEVEL, UNSEEN) - 0.01
    losses, slope = gradient(losses_of(wga), low.tolist())
    assert torch.isfinite(losses).all()
    assert not slope.any()


def test_the_text_to_say_instead_is_pulled_as_the_loss_says():
    """Of a pair the second text is stopped and scaled; the first is neither."""

    def pair(log_likelihood, example, counts):
        means = log_likelihood.new_zeros(2).index_add(0, example, log_likelihood.exp()) / counts
        return (means[1] - means[0]).view(1)

    values = [-5.0, -5.0, -5.0, -5.0, -1.0, -9.0]
    _, slope = gradient(pair, values, group_size=2)
    x = torch.tensor(values, requires_grad=True)
    (plain,) = torch.autograd.grad(pair(x, EXAMPLE, COUNTS).sum(), x)
    assert slope[4].item() == pytest.approx(0.5)
    assert slope[5].item() == 0
    assert torch.equal(slope[:4], plain[:4])
