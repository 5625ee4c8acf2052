"""Each method on log-likelihoods, from text to gradient, against its formula in float64 on the model's own logits."""

import math

import pytest
import test_methods_vocabulary
import tiny
import torch

from pyunlearn.data import Tokens, collate
from pyunlearn.methods import METHODS
from pyunlearn.models import Likelihood
from pyunlearn.unlearning.loss_tensors import example_tensors, token_tensors

TEXTS = [Tokens((5, 6, 7, 8, 9), 2), Tokens((3, 4, 12, 30, 31, 32, 33), 4), Tokens((9, 1, 2), 1), Tokens((4, 8, 15), 2)]


def sg(x):
    return x.detach()


def log_sigmoid(x):
    return torch.log(1 / (1 + torch.exp(-x)))


FORMULAS = {  # of one example: x and r, (T,) under model and reference
    "ga": lambda x, r: x.mean(),
    "npo": lambda x, r: -20 * log_sigmoid(-0.1 * (x.sum() - r.sum())),
    "simnpo": lambda x, r: -0.8 * log_sigmoid(-2.5 * x.mean()),
    "kto": lambda x, r: (1 - 1 / (1 + torch.exp(0.1 * (x.sum() - r.sum())))) / 0.1,
    "hinge": lambda x, r: max(0.0 * x.sum(), 6 * len(x) + x.sum()),
    "idk": lambda x, r: -x.mean(),
    "wga": lambda x, r: (sg(x).exp() * x).mean(),
    "tnpo": lambda x, r: (2 * sg(x).exp() ** 4 / (sg(x).exp() ** 4 + r.exp() ** 4) * x).mean(),
    "wtnpo": lambda x, r: (2 * sg(x).exp() ** 5.5 / (sg(x).exp() ** 4 + r.exp() ** 4) * x).mean(),
    "satimp": lambda x, r: (sg(x).exp() ** 5 * (1 - sg(x).exp()) * x).mean(),
}
PAIRED = {  # of a refusal and a forget text
    "dpo": lambda w, v, x, r: -20 * log_sigmoid(0.1 * ((w - v).sum() - (x - r).sum())),
    "idkdpo": lambda w, v, x, r: -20 * log_sigmoid(0.1 * ((w - v).sum() - (x - r).sum())),
    "altpo": lambda w, v, x, r: -20 * log_sigmoid(0.1 * ((w - v).sum() - (x - r).sum())),
    "flat": lambda w, v, x, r: -w.exp().mean() + (x.exp().mean() - 1).exp(),
}


def test_every_method_has_a_formula():
    """It is one of these, or of those in the files for match, distributions and hidden states."""
    kinds = {name: method.kind for name, method in METHODS.items()}
    assert {name for name, kind in kinds.items() if kind in ("example", "token")} == {*FORMULAS, *PAIRED, "match"}
    assert {name for name, kind in kinds.items() if kind == "vocabulary"} == {*test_methods_vocabulary.FORMULAS}
    assert {name for name, kind in kinds.items() if kind == "hidden"} == {"rmu", "adaptive_rmu"}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", [*FORMULAS, *PAIRED])
def test_a_loss_is_its_formula(name, side):
    """Value and every parameter's gradient, for texts of different lengths padded on either side."""
    torch.manual_seed(0)
    model = tiny.tiny_llama(60).double().eval()
    for p in model.parameters():
        p.data.mul_(3)
    g = torch.Generator().manual_seed(1)
    references = [-3 * torch.rand(len(t.scored), generator=g, dtype=torch.float64) for t in TEXTS]
    rows = [torch.log_softmax(model(torch.tensor([t.ids])).logits[0, t.first - 1 : -1], -1) for t in TEXTS]
    each = [z.gather(1, torch.tensor(t.scored)[:, None])[:, 0] for z, t in zip(rows, TEXTS, strict=True)]
    both = list(zip(each, references, strict=True))
    if name in PAIRED:
        right = sum(PAIRED[name](*both[i], *both[i + 1]) for i in (0, 2))
    else:
        right = sum(FORMULAS[name](*pair) for pair in both)
    wanted = torch.autograd.grad(right, list(model.parameters()))
    method, likelihood = METHODS[name], Likelihood(model)
    batch = collate(TEXTS, pad_id=0)
    batch = test_methods_vocabulary.on_the_left(batch) if side == "left" else batch
    digits = (
        1e-4 if side == "left" else 1e-6
    )  # rotary angles are float32: a text moved to the right is not quite the same
    reference = torch.cat(references) if method.token else torch.stack([r.sum() for r in references])
    call = likelihood.token_objective if method.token else likelihood.objective

    def loss(*tensors):
        return method.loss(token_tensors(*tensors) if method.token else example_tensors(method, *tensors), {})

    objective = call(batch, loss, reference, group_size=len(method.roles))
    assert likelihood.fused
    assert objective.loss.item() == pytest.approx(right.item(), rel=digits)
    gradients = torch.autograd.grad(objective.loss, list(model.parameters()))
    for mine, exact in zip(gradients, wanted, strict=True):
        assert (mine - exact).abs().max() <= digits * max(1e-3, float(exact.abs().max()))
    assert math.isfinite(right.item())
