"""Calibration by mixing: the largest weight that keeps a metric, exact ends, adapters by scaling."""

import copy

import pytest
import torch
from test_edits import adapted, bits, encoded, llama, narrow, same, weights

from pyunlearn.edits import calibrate_by_mixing, task_vector
from pyunlearn.errors import ArgumentError, ModelError


def two(make_pair, shift=0.01):
    """Make (original, unlearned, tokenizer, rows): every trainable weight is moved."""
    tokenizer, make, rows = make_pair()
    torch.manual_seed(0)
    original = make(len(tokenizer)).eval()
    unlearned = copy.deepcopy(original)
    for p in unlearned.parameters():
        if p.requires_grad:
            p.data.add_(shift * torch.randn_like(p))
    return original, unlearned, tokenizer, rows


def how_far(original, name):
    """Return metrics that are 1 at the original and 0 at `far` from it, linear in the mixing weight."""
    start = weights(original)[name].double()

    def metric(far):
        return lambda model: 1 - float((dict(model.named_parameters())[name].detach().double() - start).norm() / far)

    return metric


@pytest.mark.parametrize("make_pair", [llama, narrow])
def test_the_weight_is_the_largest_that_keeps_the_metric(make_pair):
    """The weight is that of a linear metric; the mixture is the formula, rounded once; undo restores the weights."""
    original, unlearned, _, _ = two(make_pair)
    name, before, after = "lm_head.weight", weights(original), weights(unlearned)
    far = float((after[name].double() - before[name].double()).norm())
    for first in (original, original.state_dict()):
        mixed = calibrate_by_mixing(first, unlearned, how_far(original, name)(far), tau=0.4)
        assert mixed.weight == pytest.approx(0.6, abs=1 / 128 + (0.02 if make_pair is narrow else 0))
        assert mixed.value >= 0.4 * mixed.original == pytest.approx(0.4)
        assert mixed.monotone
        assert [a for a, _ in mixed.curve if a in (0, 0.25, 0.5, 0.75, 1)] == [0, 0.25, 0.5, 0.75, 1]
        for n, p in unlearned.named_parameters():
            wanted = before[n].double() + mixed.weight * (after[n].double() - before[n].double())
            torch.testing.assert_close(
                p.detach().double(), wanted, rtol=0.01 if make_pair is narrow else 1e-5, atol=1e-6
            )
        assert mixed.undo() is unlearned
        assert same(weights(unlearned), after)


@pytest.mark.parametrize("tau", [0.3, 0.95, 1.0])
@pytest.mark.parametrize(("short", "weight"), [(0.0, 1.0), (2e-16, 0.8125), (1e-9, 0.8125), (5e-4, 0.8125)])
def test_no_mixture_below_tau_is_accepted_by_however_little(tau, short, weight):
    """metric(mixture) >= tau * metric(original) exactly: a value short by a rounding fails, an equal one passes."""
    original, unlearned, _, _ = two(llama)
    name = "model.norm.weight"
    start, end = weights(original)[name].double(), weights(unlearned)[name].double()

    def metric(model):
        share = float((model.get_parameter(name).detach().double() - start).norm() / (end - start).norm())
        return 0.7 if share < 1e-6 else tau * 0.7 if share < 0.8126 else tau * 0.7 * (1 - short)

    mixed = calibrate_by_mixing(original, unlearned, metric, tau=tau)
    assert metric(unlearned) == mixed.value >= tau * mixed.original == tau * 0.7
    assert mixed.weight == weight
    assert short == 0 or all(value < tau * mixed.original for tried, value in mixed.curve if tried > weight)


def test_ends_have_the_bits_of_the_models():
    """The weight is 1 where nothing is lost and 0 where everything is; a metric that rises again is not monotone."""
    original, unlearned, _, _ = two(llama)
    name, before, after = "model.norm.weight", weights(original), weights(unlearned)
    assert calibrate_by_mixing(original, unlearned, lambda _: 1.0).weight == 1
    assert same(weights(unlearned), after)
    mixed = calibrate_by_mixing(original, unlearned, lambda m: float(torch.equal(m.get_parameter(name), before[name])))
    assert mixed.weight == 0
    assert same(weights(unlearned), before)
    mixed.undo()
    far = float((after[name].double() - before[name].double()).norm())
    linear = how_far(original, name)(far)
    mixed = calibrate_by_mixing(original, unlearned, lambda m: 1 - abs((1 - linear(m)) % 0.7), tau=0.8)
    assert mixed.weight == pytest.approx(0.9, abs=1 / 128)
    assert not mixed.monotone


def test_an_edit_is_calibrated_from_its_saved_values():
    """The EditResult stands for the original: undone in turn, the first weights are back."""
    original, unlearned, tokenizer, rows = two(llama)
    before = weights(original)
    edited = task_vector(original, rows, fine_tuned=unlearned, tokenizer=tokenizer)
    far = float((original.model.norm.weight - before["model.norm.weight"]).norm().detach())

    def metric(model):
        return 1 - float((model.model.norm.weight - before["model.norm.weight"]).norm().detach()) / far

    mixed = calibrate_by_mixing(edited, original, metric, tau=0.75)
    assert mixed.weight == pytest.approx(0.25, abs=1 / 128)
    mixed.undo()
    edited.undo()
    assert same(weights(original), before)


def test_an_adapter_is_scaled_not_mixed_factor_by_factor():
    """The update is a times the whole one, not a squared; None stands for the model without the adapter."""
    original, unlearned, tokenizer, rows = two(adapted, shift=0.1)
    tokens = torch.tensor([encoded(tokenizer, rows)[0].ids])
    for n, p in original.named_parameters():
        if "lora_B" in n:
            p.data.zero_()
    before, after = weights(original), weights(unlearned)
    total = float(sum(p.norm() for n, p in after.items() if "lora_B" in n))

    def metric(model):
        return 1 - 0.5 * float(sum(p.norm() for n, p in model.named_parameters() if "lora_B" in n).detach()) / total

    for first in (original, None):
        mixed = calibrate_by_mixing(first, unlearned, metric, tau=0.75)
        assert mixed.weight == pytest.approx(0.5, abs=1 / 128)
        for n, p in unlearned.named_parameters():
            if "lora_B" in n:
                torch.testing.assert_close(p.detach(), mixed.weight * after[n])
            else:
                assert torch.equal(bits(p.detach()), bits(after[n]))
        mixed.undo()
        assert same(weights(unlearned), after)
    calibrate_by_mixing(None, unlearned, lambda m: float(torch.equal(m(tokens).logits, original(tokens).logits)) + 1e-9)
    torch.testing.assert_close(unlearned(tokens).logits, original(tokens).logits, rtol=0, atol=0)
    assert any(not torch.equal(before[n], p) for n, p in unlearned.named_parameters())  # A stays, and does nothing


def test_what_cannot_be_mixed_is_refused_and_the_unlearned_weights_stay():
    """A log-likelihood as metric, a metric that raises, another model, tau, an adapter that did not start from zero."""
    original, unlearned, _, _ = two(llama)
    after = weights(unlearned)
    for options, error, message in (
        ({"metric": lambda _: -2.0}, ArgumentError, "above 0 for the original, and returned -2.0"),
        (
            {"metric": lambda m: 1.0 if same(weights(m), weights(original)) else float("nan")},
            ArgumentError,
            "mixture of weight",
        ),
        ({"metric": lambda _: 1 / 0}, ZeroDivisionError, "division"),
        ({"original": unlearned}, ArgumentError, "another model than the unlearned one"),
        ({"original": {"x": torch.ones(1)}}, ArgumentError, "and has no model.embed_tokens.weight"),
        ({"original": None}, ModelError, "nothing but LoRA adapters"),
        ({"tau": 1.5}, ArgumentError, "tau must be a number, above 0 and at most 1"),
    ):
        with pytest.raises(error, match=message):
            calibrate_by_mixing(
                **{"original": original, "unlearned_model": unlearned, "metric": lambda _: 1.0, **options}
            )
        assert same(weights(unlearned), after)
    first, second, _, _ = two(adapted)
    with pytest.raises(ModelError, match="merge it into the weights first"):
        calibrate_by_mixing(first, second, lambda _: 1.0)
