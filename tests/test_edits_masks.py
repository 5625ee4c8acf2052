"""Masks: which weights they name, and that a run leaves all others as they were, bit for bit."""

import peft
import pytest
import tiny
import torch
from coverings import in_full
from hypothesis import given
from hypothesis import strategies as st
from test_edits import adapted, bits, encoded, gpt2, llama, mean_loss, same, weights

import pyunlearn
from pyunlearn.edits import saliency_mask
from pyunlearn.edits.masks import digest_of, mask_of
from pyunlearn.edits.weight_scores import largest
from pyunlearn.errors import ArgumentError, DataError, TrainingError
from pyunlearn.methods import METHODS
from pyunlearn.unlearning import optimizer
from pyunlearn.unlearning.adam import Adam, assign, exact

pytestmark = pytest.mark.usefixtures("one_thread")

# ---------------------------------------------------------------- ranking


@given(st.lists(st.lists(st.sampled_from([0.0, 1e-42, 0.5, 1.0, 1.0000001, 3e38]), max_size=6), max_size=4), st.data())
def test_the_largest_are_those_that_sorting_puts_first(lists, data):
    """The count is exact over all tensors, with ties in their order; denormals and huge numbers included."""
    scores = {i: torch.tensor(x) for i, x in enumerate(lists)}
    every = torch.cat([*scores.values(), torch.zeros(0)])
    count = data.draw(st.integers(0, len(every)))
    wanted = torch.zeros(len(every), dtype=torch.bool)
    wanted[every.argsort(descending=True, stable=True)[:count]] = True
    masks = largest(scores, count)
    assert torch.equal(torch.cat([*masks.values(), torch.zeros(0, dtype=torch.bool)]), wanted)


# ---------------------------------------------------------------- saliency


@pytest.mark.parametrize("make_pair", [llama, gpt2, adapted])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_salient_weights_have_the_largest_gradients_of_all_parameters(make_pair, batch_size):
    """Gradients of the summed loss are ranked over all parameters, for any batch size; exactly the share is True."""
    tokenizer, make, rows = make_pair()
    torch.manual_seed(0)
    model = make(len(tokenizer)).train()
    before = weights(model)
    mask = saliency_mask(model, rows, share=0.1, tokenizer=tokenizer, batch_size=batch_size)
    assert same(weights(model), before)
    assert all(m.training for m in model.modules())
    trains = {n: p for n, p in model.eval().named_parameters() if p.requires_grad}
    loss = mean_loss(model, encoded(tokenizer, rows))
    gradients = torch.autograd.grad(loss, list(trains.values()), allow_unused=True, materialize_grads=True)
    assert list(mask) == list(trains)
    assert all(mask[n].shape == p.shape for n, p in trains.items())
    chosen = torch.cat([m.flatten() for m in mask.values()])
    sizes = torch.cat([g.abs().flatten() for g in gradients])
    assert int(chosen.sum()) == round(0.1 * len(sizes))
    threshold = float(sizes.sort(descending=True).values[int(chosen.sum()) - 1])
    slack = 1e-3 * threshold + 1e-7
    assert float(sizes[chosen].min()) >= threshold - slack
    assert float(sizes[~chosen].max()) <= threshold + slack


def test_a_share_of_one_is_everything_and_others_are_refused():
    """A broken model has no salient weights."""
    tokenizer, make, rows = llama()
    model = make(len(tokenizer))
    assert all(bool(m.all()) for m in saliency_mask(model, rows, share=1, tokenizer=tokenizer).values())
    for share in (0, 1.5, float("nan"), True, "half"):
        with pytest.raises(ArgumentError, match="share must be a number, above 0 and at most 1"):
            saliency_mask(model, rows, share=share, tokenizer=tokenizer)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.inf)
    with pytest.raises(TrainingError, match="infinite or NaN"):
        saliency_mask(model, rows, tokenizer=tokenizer)


# ---------------------------------------------------------------- a run with a mask


def run(trained, *, model=None, **options):
    options = {"retain": trained.corpus, "holdout": trained.holdout, "learning_rate": 3e-4, "progress": False} | options
    model = trained.fresh() if model is None else model
    return pyunlearn.unlearn(model, trained.forget, tokenizer=trained.tokenizer, **options)


def check_held(mask, before, after):
    """Every bit where the mask is False is as before, and something else is not."""
    moved = 0
    for name, m in mask.items():
        changed = bits(before[name]) != bits(after[name])
        assert not bool(changed[~m].any()), name
        moved += int(changed.sum())
    assert moved


@pytest.mark.full
@pytest.mark.parametrize("method", ["ga", *in_full("npo", "simnpo")])
def test_a_text_is_forgotten_by_the_salient_weights_alone(story, method):
    """Any method forgets; the other half of the weights keep every bit."""
    mask, options = saliency_mask(story.model, story.forget, tokenizer=story.tokenizer), {}
    if method == "simnpo":
        options["learning_rate"] = 2e-4
    result = run(story, mask=mask, method=method, **options)
    assert [e.verdict for e in result.examples] == ["forgotten"] * 2
    assert result.utility.relative_rise < 0.05
    check_held(mask, weights(story.model), weights(result.model))
    if method == "ga":
        assert same(weights(run(story, method=method, mask="saliency").model), weights(result.model))


class Restless(Adam):
    """Momentum and decay move a weight that has no gradient."""

    def __init__(self, parameters, lr, momentum, **options):
        super().__init__(parameters, lr, momentum=0.9, **options)

    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        for p in self.param_groups[0]["params"]:
            rest = self.rests.get(p)
            assign(p, rest, exact(p, rest) * (1 - 10 * self.param_groups[0]["lr"]))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "adapters"])
def test_momentum_and_decay_do_not_move_what_the_mask_holds(story, kind, monkeypatch):
    """The float32 copies of 16-bit weights do not move either."""
    model = story.fresh()
    if kind == "bfloat16":
        model = model.bfloat16()
    if kind == "adapters":
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model = peft.get_peft_model(model, config)
    before = weights(model)
    torch.manual_seed(0)
    mask = {n: torch.rand(p.shape) < 0.5 for n, p in model.named_parameters() if n != "model.norm.weight"}
    monkeypatch.setattr(optimizer, "Adam", Restless)
    result = run(story, model=model, mask=mask, learning_rate=1e-3, max_steps=2, utility_budget=10)
    assert True in [r["accepted"] for r in result.history if "accepted" in r]
    check_held({n: m for n, m in mask.items() if n in before}, before, weights(model))


def test_what_the_mask_holds_does_not_count_in_the_gradient_s_norm(story):
    """Neither in the record of a step nor in the clipping."""
    model = story.fresh()
    mask = {n: torch.zeros(p.shape, dtype=torch.bool) for n, p in model.named_parameters() if n != "model.norm.weight"}
    result = run(story, model=model, mask=mask, retain=None, max_steps=1)
    model = story.fresh()
    for n, p in model.named_parameters():
        p.requires_grad_(n == "model.norm.weight")
    alone = run(story, model=model, retain=None, max_steps=1)
    assert result.history[0]["gradient_norm"] == pytest.approx(alone.history[0]["gradient_norm"], rel=1e-4)
    assert same(weights(result.model), weights(alone.model))


def test_nonzero_keeps_pruned_weights_at_zero(story):
    """Weights that are 0 when the run begins are 0 after it."""
    model = story.fresh()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:, ::2] = 0
    before = weights(model)
    result = run(story, model=model, mask="nonzero", max_steps=2)
    zeros = before["model.layers.0.mlp.up_proj.weight"] == 0
    assert bool((result.model.model.layers[0].mlp.up_proj.weight[zeros] == 0).all())
    check_held({n: p != 0 for n, p in before.items()}, before, weights(result.model))
    assert result.settings["mask"] == "nonzero"


@pytest.mark.full
def test_a_resumed_run_keeps_its_mask_and_no_other_is_let_in(story, tmp_path, monkeypatch):
    """The checkpoint holds it: the numbers are those of an uninterrupted run."""
    mask = saliency_mask(story.model, story.forget, share=0.3, tokenizer=story.tokenizer)
    options = {
        "method": "ga",
        "batch_size": 1,
        "max_steps": 6,
        "mask": mask,
        "l1": 0.5,
        "retain": None,
        "holdout": story.holdout[:20],
    }
    whole, calls, loss = run(story, **options), [], METHODS["ga"].function

    def cut(*arguments, **more):
        calls.append(1)
        if len(calls) > 4:
            raise KeyboardInterrupt
        return loss(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setitem(METHODS, "ga", tiny.with_loss("ga", cut))
        assert run(story, **options, output_dir=tmp_path / "out").stopped == "interrupted"
    other = {n: ~m for n, m in mask.items()}
    for wrong in (other, None, "saliency"):
        with pytest.raises(DataError, match="was made with mask="):
            run(story, **{**options, "mask": wrong}, output_dir=tmp_path / "out", resume=True)
    for name, value in (("l1", 0.0), ("max_steps", 7)):  # whose schedule would be another
        with pytest.raises(DataError, match=f"was made with {name}="):
            run(story, **{**options, name: value}, output_dir=tmp_path / "out", resume=True)
    resumed = run(story, **options, output_dir=tmp_path / "out", resume=True)
    assert same(weights(resumed.model), weights(whole.model))
    assert resumed.settings["mask"] == digest_of(mask) != digest_of(other)
    check_held(mask, weights(story.model), weights(resumed.model))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ("salient", r"must be 'saliency', 'nonzero' or a dict .*, got 'salient'"),
        (0.5, "got 0.5"),
        ({"lm_heat.weight": torch.ones(1, dtype=torch.bool)}, "'lm_heat.weight', which is no parameter"),
        ({"lm_head.weight": torch.ones(3, dtype=torch.bool)}, r"have the parameter's shape \(\d+, 64\), got \(3,\)"),
        ({"model.norm.weight": torch.ones(64)}, "got torch.float32"),
        ({"model.norm.weight": [True]}, "got list"),
    ],
)
def test_a_mask_that_fits_nothing_is_refused(story, mask, message):
    """One sentence, and nothing is changed."""
    model = story.fresh()
    with pytest.raises(ArgumentError, match=message):
        run(story, model=model, mask=mask)
    assert same(weights(model), weights(story.model))


def test_a_mask_that_lets_nothing_change_is_refused():
    """A frozen parameter's mask says nothing, and one that is missing lets its parameter change."""
    tokenizer, make, _ = llama()
    model = make(len(tokenizer))
    nothing = {n: torch.zeros(p.shape, dtype=torch.bool) for n, p in model.named_parameters()}
    with pytest.raises(ArgumentError, match="lets no trainable weight change"):
        mask_of(nothing, model, [])
    model.lm_head.weight.requires_grad_(False)
    nothing["lm_head.weight"].fill_(True)
    with pytest.raises(ArgumentError, match="lets no trainable weight change"):
        mask_of(nothing, model, [])
    del nothing["model.norm.weight"]
    assert set(mask_of(nothing, model, [])) == set(nothing) - {"lm_head.weight"}
