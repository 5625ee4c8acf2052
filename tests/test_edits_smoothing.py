"""Zero-shot smoothing: its loss and gradient against autograd, and a trained model with a smoother surrounding."""

import pytest
import torch
from test_edits import adapted, check_undone, encoded, gpt2, llama, narrow, same, weights
from test_edits_fisher import likelihoods
from test_edits_influence import flat, small  # noqa: F401
from test_edits_prune import t5

from pyunlearn.edits import smoothing, zero_shot_smoothing
from pyunlearn.errors import ArgumentError, TrainingError
from pyunlearn.metrics import generalized_exposure

pytestmark = pytest.mark.usefixtures("one_thread")


def loss_of(model, tokens, two_sided):
    """Compute L by inputs_embeds: 3 samples, sigma half of the table's root mean square."""
    generator, table = torch.Generator().manual_seed(5), model.get_input_embeddings().weight.detach()
    embedded = table[torch.tensor([t.ids for t in tokens])]
    z, total = model(inputs_embeds=embedded).logits, 0
    for _ in range(3):
        xi = 0.5 * float(table.square().mean().sqrt()) * torch.randn(embedded.shape, generator=generator).double()
        noisy = model(inputs_embeds=embedded + xi).logits
        for b, t in enumerate(tokens):
            apart = z[b] - (noisy[b] if two_sided else noisy[b].detach())
            total = total + apart[t.first - 1 : -1].norm(dim=-1).mean() / xi[b].norm() / (3 * len(tokens))
    return total


@pytest.mark.parametrize("two_sided", [True, False])
def test_one_step_is_the_gradient_of_the_loss(small, two_sided):  # noqa: F811
    """theta - rate grad L, with norms over the whole text's noise, means over its tokens, and nothing clamped."""
    model, tokenizer = small
    rows = ["the cat sees a lamp.", "the cat sees a tree.", "the king sees a tree."]
    tokens = [t for t in encoded(tokenizer, rows) if len(t) == len(encoded(tokenizer, rows[:1])[0])]
    rows = rows[: len(tokens)]
    assert len(rows) > 1
    before = flat(model)
    trains = [p for p in model.parameters() if p.requires_grad]
    loss = loss_of(model, encoded(tokenizer, rows), two_sided)
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(loss, trains)])
    edited = zero_shot_smoothing(model, rows, tokenizer=tokenizer, rate=0.25, samples=3, two_sided=two_sided, seed=5)
    assert edited.diagnostics == {"sensitivity": [pytest.approx(loss.item())], "steps": 1}
    torch.testing.assert_close(flat(model) - before, -0.25 * wanted)
    edited.undo()
    assert torch.equal(flat(model), before)


def test_each_batch_begins_with_no_gradient(monkeypatch):
    """Steps of equal gradients are equal: they do not add up from batch to batch."""
    tokenizer, make, rows = llama()
    model = make(len(tokenizer))
    before = weights(model)

    def ones(edit, *_):
        sum(p.sum() for p in edit.parameters.values()).backward()
        return 1.0

    monkeypatch.setattr(smoothing, "_sensitivity", ones)
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    edited = zero_shot_smoothing(model, rows, tokenizer=tokenizer, rate=0.125, batch_size=1, passes=2)
    assert edited.diagnostics["steps"] == 2 * len(rows)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] - 0.125 * 2 * len(rows))
        assert bool((p.grad == 7).all())


@pytest.mark.parametrize("make_pair", [llama, gpt2, narrow, adapted, t5])
def test_every_kind_of_model_is_smoothed_and_comes_back(make_pair):
    """Tied heads, dropout, 16 bits, adapters, two stacks: the same each time."""
    tokenizer, make, rows = make_pair()
    torch.manual_seed(0)
    model = make(len(tokenizer)).train()
    before = weights(model)
    options = {"tokenizer": tokenizer, "rate": 0.05, "samples": 2, "batch_size": 2}
    edited = zero_shot_smoothing(model, rows[:3], **options)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    after = weights(model)
    check_undone(edited, before, model)
    zero_shot_smoothing(model, rows[:3], **options)
    assert same(weights(model), after)


def test_the_secret_s_surroundings_become_smooth_and_its_exposure_falls(story):
    """Exposure falls from the maximum to below significance, with the texts alone, at less than 2 % of utility."""
    model = story.fresh()
    edited = zero_shot_smoothing(model, story.forget, retain=story.retain, rate=0.015, tokenizer=story.tokenizer)
    non_members = likelihoods(story.model, story, story.holdout)
    then, now = (
        generalized_exposure(likelihoods(m, story, story.forget), non_members).lower for m in (story.model, model)
    )
    assert then.min() > 5.9
    assert now.max() < 4.32
    assert edited.nll_after["retain"] < 1.02 * edited.nll_before["retain"]
    assert sum(likelihoods(model, story, story.holdout)) < 1.02 * sum(non_members)


@pytest.mark.full
def test_the_gradient_through_one_side_alone_does_not_smooth(story):
    """The loss falls by half with both sides, which are the default, and rises with one."""
    fell = {}
    for two_sided, rate in ((True, 0.005), (False, 0.0003)):
        edited = zero_shot_smoothing(
            story.fresh(), story.forget, rate=rate, passes=5, two_sided=two_sided, tokenizer=story.tokenizer
        )
        fell[two_sided] = edited.diagnostics["sensitivity"][-1] / edited.diagnostics["sensitivity"][0]
    assert fell[True] < 0.6
    assert fell[False] > 1


def test_smoothing_that_cannot_be_is_refused_and_nothing_is_changed():
    """Numbers out of range, and a rate that breaks the model in its second step."""
    tokenizer, make, rows = llama()
    model = make(len(tokenizer))
    before = weights(model)
    kinds = {"sigma": "number, above 0", "rate": "number, above 0", "samples": "whole number", "passes": "whole number"}
    for name, kind in kinds.items():
        with pytest.raises(ArgumentError, match=f"{name} must be a {kind}"):
            zero_shot_smoothing(model, rows, tokenizer=tokenizer, **{name: 0})
    with pytest.raises(ArgumentError, match="two_sided must be True or False, got 'no'"):
        zero_shot_smoothing(model, rows, tokenizer=tokenizer, two_sided="no")
    with pytest.raises(TrainingError, match="take a smaller rate"):
        zero_shot_smoothing(model, rows[:1], tokenizer=tokenizer, rate=1e38, samples=1, passes=3)
    assert same(weights(model), before)
