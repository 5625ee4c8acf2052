"""Methods on the hidden states of one layer: their formulas, the weights they train, and the loop's guarantees."""

import copy
import math

import numpy as np
import peft
import pytest
import tiny
import torch
from unlearning_runs import Interrupted, recorded_gradients, run, same, timeless, weights

from pyunlearn.data import encode, read_examples
from pyunlearn.errors import ArgumentError
from pyunlearn.methods import METHODS, adaptive_rmu, rmu
from pyunlearn.methods.rmu import representation_drift, steering_direction
from pyunlearn.metrics import NULL_MEAN, SIGNIFICANT
from pyunlearn.metrics.verdict import NOT_EXTRACTED

BOTH = ("rmu", "adaptive_rmu")
QUICK = {"layer": 1, "alpha": 10.0}  # for two layers, and retain text of the forget text's own grammar


def rows(seed=0):
    """(hidden (7, 5), example, counts, lengths, direction (5,)): three examples of 2, 4 and 1 tokens, float64."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(7, 5, generator=g, dtype=torch.float64, requires_grad=True)
    return hidden, torch.tensor([0, 0, 1, 1, 1, 1, 2]), torch.tensor([2, 4, 1]), steering_direction(5, seed).double()


def by_hand(hidden, goals):
    """Return (B,) mean squared distances of each span from its goal, and their gradient, by plain loops."""
    spans, losses, gradient = [(0, 2), (2, 6), (6, 7)], [], np.zeros((7, 5))
    for (a, b), goal in zip(spans, goals, strict=True):
        apart = hidden.detach().numpy()[a:b] - goal
        losses.append(sum(x * x for row in apart for x in row) / 5 / (b - a))
        gradient[a:b] = 2 * apart / 5 / (b - a)
    return np.array(losses), gradient


# ---------------------------------------------------------------- formulas


@pytest.mark.parametrize("coefficient", [0.0, 6.5, 300.0])
def test_rmu_is_its_formula(coefficient):
    """Each example's mean over its own tokens, value and gradient; examples of different lengths count the same."""
    hidden, example, counts, u = rows()
    losses = rmu(hidden, example, counts, u, coefficient=coefficient, reduction="none")
    wanted, gradient = by_hand(hidden, [coefficient * u.numpy()] * 3)
    np.testing.assert_allclose(losses.detach(), wanted, rtol=1e-12)
    np.testing.assert_allclose(torch.autograd.grad(losses.sum(), hidden)[0], gradient, rtol=1e-12)
    mean = rmu(hidden, example, counts, u, coefficient=coefficient)
    assert mean.item() == pytest.approx(wanted.mean(), rel=1e-12)


def test_adaptive_rmu_is_its_formula():
    """The goal is beta times each example's own norm, along the same direction."""
    hidden, example, counts, u = rows(1)
    norms = torch.tensor([3.0, 0.5, 80.0], dtype=torch.float64)
    losses = adaptive_rmu(hidden, example, counts, u, norms, beta=4.0, reduction="none")
    wanted, gradient = by_hand(hidden, [4.0 * n * u.numpy() for n in norms.tolist()])
    np.testing.assert_allclose(losses.detach(), wanted, rtol=1e-12)
    np.testing.assert_allclose(torch.autograd.grad(losses.sum(), hidden)[0], gradient, rtol=1e-12)
    alike = adaptive_rmu(hidden, example, counts, u, torch.full((3,), 1.3, dtype=torch.float64))
    assert alike.item() == pytest.approx(rmu(hidden, example, counts, u, coefficient=6.5).item(), rel=1e-12)


def test_the_retain_term_is_its_formula():
    """The mean squared distance to where the hidden states were; nothing, with no gradient, while they are there."""
    hidden, example, counts, _ = rows(2)
    reference = rows(3)[0].detach()
    losses = representation_drift(hidden, reference, example, counts, reduction="none")
    ends = [reference.numpy()[a:b] for a, b in [(0, 2), (2, 6), (6, 7)]]
    wanted, gradient = by_hand(hidden, ends)
    np.testing.assert_allclose(losses.detach(), wanted, rtol=1e-12)
    np.testing.assert_allclose(torch.autograd.grad(losses.sum(), hidden)[0], gradient, rtol=1e-12)
    still = representation_drift(hidden, hidden.detach(), example, counts)
    assert still.item() == 0.0
    assert torch.autograd.grad(still, hidden)[0].abs().max() == 0.0


def test_the_direction_is_uniform_and_not_gaussian():
    """It has length 1 and no negative or outstanding component, as a normal vector would have; the seed decides."""
    u = steering_direction(4096, 0)
    assert u.norm().item() == pytest.approx(1.0, abs=1e-6)
    assert (u >= 0).all()
    assert u.max() < 2.2 * u.mean()
    assert (u * math.sqrt(4096 / 3)).mean().item() == pytest.approx(0.5, abs=0.02)
    assert torch.equal(u, steering_direction(4096, 0))
    assert not torch.equal(u, steering_direction(4096, 1))


# ---------------------------------------------------------------- the loop's two terms, against float64


def directly(model, trained, forget, retain, method, options, seed=0):
    """Return the losses and gradients of one step from output_hidden_states of a float64 copy, text by text."""
    wide, before = copy.deepcopy(model).double(), trained.fresh().double()
    layer, alpha = options["layer"], options["alpha"]

    def hidden(m, rows):
        for t in encode(read_examples(rows, role="x"), trained.tokenizer, role="x", max_length=None):
            yield m(torch.tensor([t.ids]), output_hidden_states=True).hidden_states[layer + 1][0, t.first - 1 : -1]

    u = steering_direction(wide.config.hidden_size, seed).double()
    with torch.no_grad():
        before_states = list(hidden(before, retain))
        norms = [h.norm(dim=-1).mean() for h in hidden(before, forget)]
    c = [options["coefficient"]] * len(forget) if method == "rmu" else [options["beta"] * n for n in norms]
    loss = sum((h - x * u).square().mean() for h, x in zip(hidden(wide, forget), c, strict=True)) / len(forget)
    drift = sum((h - k).square().mean() for h, k in zip(hidden(wide, retain), before_states, strict=True)) / len(retain)
    (loss + alpha * drift).backward()
    return loss.item(), drift.item(), {name: p.grad for name, p in wide.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", BOTH)
def test_a_step_is_the_formula_s_gradient(answerer, method, monkeypatch):
    """Loss and gradient of the first step and of the second, whose retain text has moved; only answers count."""
    options = {"layer": 0, "alpha": 50.0} | ({"coefficient": 9.0} if method == "rmu" else {"beta": 2.0})
    forget, retain = answerer.forget, answerer.retain[:4]
    model, gradients = answerer.fresh(), recorded_gradients(monkeypatch)
    for steps in (1, 2):
        start = copy.deepcopy(model)
        model = answerer.fresh()
        result = run(
            answerer,
            forget,
            model=model,
            retain=retain,
            method=method,
            method_options=options,
            max_steps=steps,
            max_grad_norm=1e9,
            learning_rate=1e-3,
            target_exposure=0.0,
            utility_budget=1e9,  # the forget term does not fade
            holdout_budget=None,
        )
        loss, drift, wanted = directly(start, answerer, forget, retain, method, options)
        assert len(result.history) == steps
        assert result.history[-1]["forget_loss"] == pytest.approx(loss, rel=1e-5)
        assert result.history[-1]["retain_drift"] == pytest.approx(drift, rel=1e-3, abs=1e-9)
        assert (drift > 1e-6) == (steps == 2)
        name = "transformer.h.0.mlp.c_proj.weight"
        torch.testing.assert_close(
            gradients[name].double(), wanted[name], rtol=1e-4, atol=1e-5 * wanted[name].abs().max().item()
        )


@pytest.fixture(scope="module")
def answerer():
    """A GPT-2 that answers questions, with positions of its own and a tied head."""
    return tiny.answerer()


@pytest.mark.parametrize("method", BOTH)
def test_no_gradient_is_computed_for_the_rest(story, method, monkeypatch):
    """Only the down projections get gradients; the others keep their bits, and their requires_grad is restored."""
    model, seen, gradients = story.fresh(), set(), recorded_gradients(monkeypatch)
    model.model.norm.weight.requires_grad_(False)
    requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda _, name=name: seen.add(name))
    result = run(story, model=model, method=method, method_options=QUICK, max_steps=2, learning_rate=1e-3)
    trained = {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)}
    assert seen == trained
    assert set(gradients) == trained
    assert all(p.grad is None for p in model.parameters())
    assert {
        name for name, p in model.state_dict().items() if not torch.equal(p, story.model.state_dict()[name])
    } == trained
    assert {name: p.requires_grad for name, p in model.named_parameters()} == requires_grad
    assert result.history[0]["retain_nll"] is None


def test_parameters_can_be_chosen(story):
    """They are named by layer or by pattern, and no others change."""
    for options, wanted in (
        ({"layer": 1, "layers": [0]}, {"model.layers.0.mlp.down_proj.weight"}),
        ({"layer": 0, "trainable": ["*.0.self_attn.o_proj.*"]}, {"model.layers.0.self_attn.o_proj.weight"}),
    ):
        result = run(story, method="rmu", method_options=options, max_steps=1, learning_rate=1e-3)
        assert {
            n for n, p in result.model.state_dict().items() if not torch.equal(p, story.model.state_dict()[n])
        } == wanted


def test_a_mask_chooses_among_those_that_train(story):
    """One over every parameter, as saliency_mask gives it: of the two down projections only its weights change."""
    mask = {
        n: torch.rand(p.shape, generator=torch.Generator().manual_seed(0)) < 0.5
        for n, p in story.model.named_parameters()
    }
    result = run(story, method="rmu", method_options=QUICK, mask=mask, max_steps=1, learning_rate=1e-3)
    moved = {n: p != story.model.state_dict()[n] for n, p in result.model.named_parameters()}
    assert {n for n, m in moved.items() if m.any()} == {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)}
    assert all((mask[n] | ~m).all() for n, m in moved.items())


# ---------------------------------------------------------------- end to end


def check_unlikely(result):
    """Check that two sentences are as likely as unseen ones, two were never memorized, and utility is within budget.

    Often few of their tokens fell far: where most are still first choices, they are not forgotten.
    """
    assert result.stopped in (("forgotten",) if result.forgotten else ("still extracted", "max_steps"))
    assert [e.verdict for e in result.examples[2:]] == ["not memorized"] * 2
    for e in result.examples[:2]:
        written = e.extraction_after > NOT_EXTRACTED or e.recited_after
        assert e.verdict == ("still exposed" if written else "forgotten")
        assert e.exposure_before > SIGNIFICANT
        assert e.exposure_after <= NULL_MEAN
        assert e.log_likelihood_after < e.log_likelihood_before - 0.1
    assert all(e.upper_exposure_after < SIGNIFICANT for e in result.examples)
    assert result.utility.relative_rise <= result.utility.budget == 0.05


@pytest.fixture(scope="module")
def steered(story):
    """The run that the tests below look at."""
    options = QUICK | {"alpha": 30.0}  # retains the texts set apart too
    return run(story, story.forget + story.unseen, method="adaptive_rmu", method_options=options, learning_rate=1e-3)


def test_a_llama_s_sentences_become_as_likely_as_unseen_ones(story, steered):
    """They end at the level of unseen text, within the utility budget; the down projections alone change."""
    check_unlikely(steered)
    changed = {n for n, p in steered.model.state_dict().items() if not torch.equal(p, story.model.state_dict()[n])}
    assert changed == {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)}


@pytest.mark.full
def test_the_retain_term_protects_the_retain_set(story, steered):
    """Without it the same run spends its utility budget before the sentences are forgotten."""
    alone = run(
        story,
        story.forget + story.unseen,
        method="adaptive_rmu",
        method_options={"layer": 1},
        learning_rate=3e-3,
        retain_loss=None,
    )
    assert alone.stopped == "utility budget"
    assert not alone.forgotten
    assert steered.utility.relative_rise < 0.05


@pytest.mark.full
def test_rmu_makes_them_as_unlikely(story):
    """It does with its own retain term."""
    options = {**QUICK, "alpha": 30.0, "coefficient": 20.0}
    check_unlikely(run(story, story.forget + story.unseen, method="rmu", method_options=options, learning_rate=2e-3))


def test_a_retain_term_that_is_too_strong_leaves_the_text_exposed(story):
    """The paper's alpha, made for text of other subjects, is too large here, and the verdict is honest."""
    result = run(story, method="rmu", max_steps=5, learning_rate=1e-3)
    assert result.stopped == "max_steps"
    assert not result.forgotten
    assert {e.verdict for e in result.examples} == {"still exposed"}


@pytest.mark.full
def test_an_interrupted_run_resumes_to_the_same_numbers(story, tmp_path, monkeypatch):
    """Reference states and direction are computed again under the original model."""
    options = {"method": "adaptive_rmu", "method_options": QUICK, "learning_rate": 3e-3, "max_steps": 6}
    whole, out, model = run(story, **options), tmp_path / "out", story.fresh()
    with monkeypatch.context() as patch:
        patch.setitem(METHODS, "adaptive_rmu", tiny.with_loss("adaptive_rmu", Interrupted("adaptive_rmu", 3)))
        cut_short = run(story, model=model, output_dir=out, **options)
    assert cut_short.stopped == "interrupted"
    assert len(cut_short.history) == 3
    assert all(p.requires_grad for p in model.parameters())
    resumed = run(story, output_dir=out, resume=True, **options)
    assert timeless(resumed.history) == timeless(whole.history)
    assert same(resumed.model, whole.model)


@pytest.mark.full
def test_micro_batches_take_the_same_steps(story):
    """With micro_batch_size=1 weights and history are the same up to rounding."""
    options = {"method": "adaptive_rmu", "method_options": QUICK, "learning_rate": 3e-3, "max_steps": 2}
    whole, parted = run(story, **options), run(story, micro_batch_size=1, **options)
    for name, p in whole.model.state_dict().items():
        torch.testing.assert_close(parted.model.state_dict()[name], p, rtol=1e-3, atol=1e-5)
    for a, b in zip(whole.history, parted.history, strict=True):
        assert b["forget_loss"] == pytest.approx(a["forget_loss"], rel=1e-5)
        assert b["retain_drift"] == pytest.approx(a["retain_drift"], rel=1e-3, abs=1e-9)


@pytest.mark.full
def test_the_seed_chooses_the_direction(story):
    """The same seed gives the same bits; another seed gives other weights."""
    options = {"method": "adaptive_rmu", "method_options": QUICK, "learning_rate": 3e-3, "max_steps": 1}
    first, again, other = (run(story, seed=seed, **options) for seed in (0, 0, 1))
    assert same(first.model, again.model)
    assert not same(first.model, other.model)


def test_adapters_alone_are_trained(story):
    """They are those on the down projections up to the layer; base weights and other adapters keep their bits."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(story.fresh(), config)
    start = weights(model)
    run(
        story,
        model=model,
        method="adaptive_rmu",
        method_options={"layer": 0, "alpha": 1.0},
        max_steps=2,
        learning_rate=1e-2,
    )
    changed = {name for name, p in model.state_dict().items() if not torch.equal(p, start[name])}
    assert changed == {f"base_model.model.model.layers.0.mlp.down_proj.lora_{ab}.default.weight" for ab in "AB"}


def test_a_t5_and_a_bfloat16_model_take_a_step(story):
    """The decoder's layer is steered; 16-bit weights move through their float32 copies."""
    t5 = tiny.trained(tiny.tiny_t5, tiny.pairs, count=20, repeats=2, epochs=1, form="$A </s>")
    result = run(t5, method="adaptive_rmu", method_options={"layer": 1}, max_steps=1, learning_rate=1e-3)
    assert result.stopped in ("max_steps", "nothing memorized")
    narrow = run(
        story,
        model=story.fresh().bfloat16(),
        method="adaptive_rmu",
        method_options=QUICK,
        max_steps=3,
        learning_rate=1e-3,
    )
    assert {p.dtype for p in narrow.model.parameters()} == {torch.bfloat16}
    assert not same(narrow.model, story.fresh().bfloat16())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method_options": {"layer": 2}}, "layer must be a whole number from 0 to 1 with this model, got 2"),
        ({"method_options": {"alpha": -1.0}}, "alpha must be a number, 0 or more, got -1.0"),
        ({"method_options": {"coefficient": math.nan}}, "coefficient must be a number, 0 or more, got nan"),
        ({"method_options": {"beta": 1.0}}, "'rmu' has no option 'beta'"),
        ({"method_options": {"alpha": 3.0}, "retain_loss": "hold"}, "alpha is the weight of the retain term"),
        ({"method_options": {"alpha": 3.0}, "retain": None}, "alpha is the weight of the retain term"),
        ({"retain_loss": "representation", "retain": None}, "needs text to keep: pass retain="),
        ({"retain_loss": "representation", "method": "ga"}, "is the own term of rmu, adaptive_rmu, and 'ga' has none"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_changed(story, options, message):
    """One sentence, and the model is as it was."""
    model = story.fresh()
    with pytest.raises(ArgumentError, match=message):
        run(story, model=model, **{"method": "rmu", **options})
    assert same(model, story.model)
    assert all(p.requires_grad for p in model.parameters())
