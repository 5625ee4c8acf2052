"""Pruning: each score against a plain loop, the numbers of zeros, and a pruned model that unlearns."""

import copy

import pytest
import tiny
import torch
from architectures import CAUSAL, made
from test_edits import adapted, check_undone, gpt2, llama, narrow, same, weights
from test_edits_masks import check_held, run
from transformers.pytorch_utils import Conv1D

from pyunlearn.data import encode, read_examples
from pyunlearn.edits import ekfac_step, prune
from pyunlearn.errors import ArgumentError, ModelError, TrainingError

pytestmark = pytest.mark.usefixtures("one_thread")


def t5():
    return tiny.make_tokenizer(form="$A </s>"), tiny.tiny_t5, tiny.pairs(5, 1)


@pytest.fixture(params=[llama, gpt2, narrow, t5], ids=lambda f: f.__name__)
def pair(request):
    tokenizer, make, rows = request.param()
    torch.manual_seed(0)
    return make(len(tokenizer)).train(), tokenizer, rows


def linear_layers(model):
    """Return {block: {weight: module}}, without the package's code."""
    layers = {}
    for name, module in model.named_modules():
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if number is not None and isinstance(module, (torch.nn.Linear, Conv1D)):
            layers.setdefault(".".join(parts[: number + 1]), {})[f"{name}.weight"] = module
    return layers


def as_rows(module, x):
    """Return (out, in), for both ways of storing a matrix."""
    return x.T if isinstance(module, Conv1D) else x


def inputs_of(model, tokenizer, rows, modules):
    """Return {weight: (in,) root mean square of its inputs}, text by text, from whole forward passes."""
    both, seen = model.config.is_encoder_decoder, {name: [] for name in modules}
    hooks = [
        module.register_forward_hook(lambda m, inputs, out, name=name: seen[name].append(inputs[0][0].float()))
        for name, module in modules.items()
    ]
    model.eval()
    for t in encode(read_examples(rows, role="x"), tokenizer, role="x", max_length=None, encoder_decoder=both):
        more = {"decoder_input_ids": torch.tensor([(2, *t.decoder[:-1])])} if both else {}
        with torch.no_grad():
            model(input_ids=torch.tensor([t.ids]), **more)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(xs).square().mean(0).sqrt() for name, xs in seen.items()}


def plain(model, tokenizer, score, retain, forget):
    """Prune the model block by block to half of each row, in a loop over rows, and return {weight: mask}."""
    model, masks = copy.deepcopy(model), {}
    for modules in linear_layers(model).values():
        x = inputs_of(model, tokenizer, retain, modules)
        f = inputs_of(model, tokenizer, forget, modules)
        for name, module in modules.items():
            w = as_rows(module, module.weight.detach()).float().abs()
            scores = w * x[name]
            if score == "forget-aware":
                scores = scores / ((w * f[name]).mean() + w * f[name])
            mask = torch.ones_like(w, dtype=torch.bool)
            for row, values in zip(mask, scores, strict=True):
                row[values.sort().indices[: len(row) // 2]] = False
            masks[name] = as_rows(module, mask)
            with torch.no_grad():
                module.weight.mul_(masks[name])
    return masks


@pytest.mark.parametrize("score", ["wanda", "forget-aware"])
def test_scores_take_each_block_s_inputs_from_the_pruned_blocks_before(pair, score):
    """Padding is no input; both ways of storing a matrix; encoder and decoder. What is left has its old bits."""
    model, tokenizer, rows = pair
    before = weights(model)
    wanted = plain(model, tokenizer, score, rows[2:], rows[:2])
    pruned = prune(model.train(), rows[:2], retain=rows[2:], score=score, tokenizer=tokenizer, batch_size=3)
    assert list(pruned.mask) == list(wanted)
    coarse = next(model.parameters()).dtype == torch.bfloat16
    for name, mask in pruned.mask.items():
        differ = float((mask != wanted[name]).float().mean())
        assert differ <= (0.02 if coarse else 0.001), name  # ties of 16-bit weights, and rounding
        assert torch.equal(dict(model.named_parameters())[name], before[name] * mask)
    assert pruned.diagnostics["sparsity"] == pytest.approx(0.5)
    assert pruned.diagnostics["unread"] == []
    check_undone(pruned, before, model)


@pytest.mark.parametrize(("groups", "sparsity"), [("row", 0.3), ("layer", 0.3), ("model", 0.3), (None, 0.9)])
def test_magnitude_drops_the_smallest_of_each_group(pair, groups, sparsity):
    """The count is exact in each row, layer or model; no text is needed."""
    model, tokenizer, _ = pair
    before = weights(model)
    pruned = prune(model, sparsity=sparsity, groups=groups, tokenizer=tokenizer)
    modules = {name: m for block in linear_layers(model).values() for name, m in block.items()}
    assert list(pruned.mask) == list(modules)
    parts = [(as_rows(m, before[name]).float().abs(), as_rows(m, pruned.mask[name])) for name, m in modules.items()]
    if groups == "row":
        parts = [pair for w, mask in parts for pair in zip(w, mask, strict=True)]
    if groups == "model":
        parts = [tuple(torch.cat([p[i].flatten() for p in parts]) for i in (0, 1))]
    for w, mask in parts:
        assert int((~mask).sum()) == int(mask.numel() * sparsity)
        assert float(w[~mask].max()) <= float(w[mask].min())
    assert pruned.nll_before == {}
    check_undone(pruned, before, model)


@pytest.mark.parametrize("score", ["magnitude", "wanda"])
def test_of_each_four_inputs_two_are_left(pair, score):
    """The pattern 2:4 runs along the inputs, for both ways of storing a matrix, at any sparsity."""
    model, tokenizer, rows = pair
    pruned = prune(model, retain=rows, score=score, pattern="2:4", sparsity=0.9, tokenizer=tokenizer)
    modules = {name: m for block in linear_layers(model).values() for name, m in block.items()}
    for name, mask in pruned.mask.items():
        assert bool((as_rows(modules[name], mask).reshape(-1, 4).sum(1) == 2).all())
        if score == "magnitude":
            w = as_rows(modules[name], pruned.before()[name]).reshape(-1, 4).abs()
            remains = as_rows(modules[name], mask).reshape(-1, 4)
            assert bool((w.where(~remains, 0).amax(1) <= w.where(remains, torch.inf).amin(1)).all())


@pytest.mark.full
def test_a_pruned_model_unlearns_and_stays_pruned(story):
    """Prune, then unlearn with the mask: zeros stay zeros, texts are forgotten, utility is within its budget."""
    model = story.fresh()
    pruned = prune(model, story.forget, retain=story.retain, score="wanda", sparsity=0.3, tokenizer=story.tokenizer)
    assert pruned.nll_after["retain"] - pruned.nll_before["retain"] < 0.1
    before = weights(model)
    result = run(story, model=model, mask=pruned.mask)
    assert result.stopped == "forgotten"
    assert any(e.verdict == "forgotten" for e in result.examples)
    assert result.utility.relative_rise < 0.05
    check_held(pruned.mask, before, weights(model))
    for name, mask in pruned.mask.items():
        assert not bool(weights(model)[name][~mask].any())


def test_wanda_keeps_more_than_magnitude_and_a_forget_aware_score_forgets_more(story):
    """At half of the weights: Wanda costs the retain texts less, the forget-aware score costs the forget texts more."""
    cost = {}
    for score in ("magnitude", "wanda", "forget-aware"):
        pruned = prune(
            story.fresh(),
            story.forget,
            retain=story.retain,
            score=score,
            sparsity=0.5,
            groups="row",
            tokenizer=story.tokenizer,
        )
        cost[score] = {role: pruned.nll_after[role] - pruned.nll_before[role] for role in ("forget", "retain")}
    assert cost["wanda"]["retain"] < cost["magnitude"]["retain"]
    assert cost["forget-aware"]["forget"] > cost["wanda"]["forget"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "taylor"}, "score must be one of magnitude, wanda, forget-aware, got 'taylor'"),
        ({"sparsity": 1}, "above 0 and below 1, got 1"),
        ({"sparsity": "half"}, "above 0 and below 1, got 'half'"),
        ({"pattern": "4:2"}, "n below m"),
        ({"pattern": "half"}, "n below m"),
        ({"pattern": 2}, "n below m"),
        ({"groups": "column"}, "got 'column'"),
        ({"groups": "model", "score": "wanda"}, "with magnitude and without a pattern"),
        ({"groups": "model", "pattern": "2:4"}, "with magnitude and without a pattern"),
        ({"score": "wanda"}, "pass retain="),
        ({"score": "forget-aware", "retain": ["the cat sees a tree."]}, "pass forget="),
        ({"pattern": "2:7"}, "7 does not divide"),
    ],
)
def test_what_cannot_be_pruned_is_refused_and_nothing_is_changed(options, message):
    """One sentence."""
    tokenizer, make, _ = llama()
    model = make(len(tokenizer))
    before = weights(model)
    with pytest.raises((ArgumentError, ModelError), match=message):
        prune(model, tokenizer=tokenizer, **options)
    assert same(weights(model), before)


def test_adapters_and_broken_models_are_refused_and_frozen_layers_left_alone():
    """An input that overflows in the second block takes the first block's zeros back."""
    tokenizer, make, rows = adapted()
    with pytest.raises(ModelError, match="merge them first"):
        prune(make(len(tokenizer)), tokenizer=tokenizer)
    tokenizer, make, rows = llama()
    model = make(len(tokenizer))
    for name, p in model.named_parameters():
        p.requires_grad_("layers.1.mlp" in name)
    assert all("layers.1.mlp" in name for name in prune(model, tokenizer=tokenizer).mask)
    model.requires_grad_(False).lm_head.requires_grad_(True)
    with pytest.raises(ModelError, match="none of them is trainable"):
        prune(model, tokenizer=tokenizer)
    model = make(len(tokenizer))
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.fill_(torch.inf)
    before = weights(model)
    with pytest.raises(TrainingError, match="that are infinite or NaN"):
        prune(model, retain=rows, score="wanda", tokenizer=tokenizer)
    assert same(weights(model), before)


@pytest.mark.parametrize("kind", ["mixtral", "olmoe"])
@pytest.mark.parametrize("edit", [prune, ekfac_step])
def test_no_expert_is_left_out_silently(edit, kind):
    """Experts with layers of their own are edited; where one parameter stacks them, the edit names it and refuses."""
    tokenizer, _, rows = llama()
    model = made(CAUSAL[kind])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    before = weights(model)
    stacked = [name for name, p in model.named_parameters() if p.dim() == 3]
    options = {"retain": rows[2:], "tokenizer": tokenizer, "progress": False}
    if stacked:
        with pytest.raises(ModelError, match=rf"{stacked[0]} \(4, .* stacks those of several experts .* fisher_step"):
            edit(model, rows[:2], **options)
        assert same(weights(model), before)
        for name in stacked:
            model.get_parameter(name).requires_grad_(False)
    edited = edit(model, rows[:2], **options)
    reached = {*edited.changed, *edited.diagnostics["unread"]}
    experts = [name for name, p in model.named_parameters() if "experts" in name and p.requires_grad]
    assert bool(experts) != bool(stacked)
    assert {*experts, *(name for name in before if "self_attn" in name and "_proj" in name)} <= reached
