"""The probes: each equals its direct definition on a small model, and leaves the model as it was."""

import copy
from functools import partial

import numpy as np
import pytest
import tiny
import torch

from pyunlearn.data import encode, read_examples
from pyunlearn.errors import ArgumentError, ModelError
from pyunlearn.methods import ga
from pyunlearn.models.inspection import is_encoder_decoder, unwrapped
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.probes import (
    gradient_inner_products,
    gradient_norms,
    mean_gradient,
    representations,
    subset_masks,
    teacher_forced,
)
from pyunlearn.probes.gradients import GROUPS, layer_groups


def llama():
    return tiny.make_tokenizer(), tiny.tiny_llama, tiny.sentences(5, 1)


def gpt2():
    return tiny.make_tokenizer(form="$A", pad=False), tiny.tiny_gpt2, tiny.facts(5, 1)


def t5():
    return tiny.make_tokenizer(form="$A </s>"), tiny.tiny_t5, tiny.pairs(5, 1)


@pytest.fixture(params=[llama, gpt2, t5], ids=lambda f: f.__name__)
def pair(request):
    """An untrained model and five examples; GPT-2 has dropout, and a head tied to its embedding."""
    tokenizer, make, rows = request.param()
    torch.manual_seed(0)
    model = make(len(tokenizer)).train()
    examples = read_examples(rows, role="forget")
    both = is_encoder_decoder(model)
    return model, encode(examples, tokenizer, role="forget", max_length=None, encoder_decoder=both)


def logits_of(model, t):
    """(T, V) logits that predict the scored tokens of one example, by the model's own forward pass."""
    ids = torch.tensor([t.ids])
    if t.decoder is None:
        return model(input_ids=ids).logits[0, t.first - 1 : -1]
    start = torch.tensor([[model.config.decoder_start_token_id, *t.decoder[:-1]]])
    return model(input_ids=ids, decoder_input_ids=start).logits[0, t.first :]


def log_likelihood_of(model, t):
    """(T,) by log_softmax."""
    return logits_of(model, t).log_softmax(-1)[range(len(t.scored)), list(t.scored)]


def gradients_of(model, t):
    """name -> gradient of the mean NLL, all at once."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    loss = -log_likelihood_of(model, t).mean()
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), gradients, strict=True)}


def unchanged(model):
    """A check that weights, gradients and mode are what they are now, bit for bit."""
    before, grads, modes = copy.deepcopy(model.state_dict()), [], [m.training for m in model.modules()]
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.5)
        grads.append(p.grad)

    def check():
        assert all(torch.equal(before[n], x) for n, x in model.state_dict().items())
        assert all(p.grad is g and bool((g == 0.5).all()) for p, g in zip(model.parameters(), grads, strict=True))
        assert [m.training for m in model.modules()] == modes

    return check


# ---------------------------------------------------------------- gradients


def test_gradient_norms_are_those_of_the_whole_gradient(pair):
    """Without dropout, in the order given; the model's own gradients come back."""
    model, tokens = pair
    check = unchanged(model)
    norms = gradient_norms(model, tokens)
    check()
    model.eval()
    for value, t in zip(norms, tokens, strict=True):
        whole = torch.cat([g.flatten() for g in gradients_of(model, t).values()])
        assert value == pytest.approx(whole.norm().item(), rel=1e-4)


def test_inner_products_of_the_groups_add_up_to_the_whole_one(pair):
    """Group by group against whole gradients; every parameter is in one group."""
    model, tokens = pair
    check, groups = unchanged(model), layer_groups(model)
    direction = mean_gradient(model, tokens[:2], partial(ga, reduction="none"), batch_size=1)
    products = gradient_inner_products(model, tokens, direction)
    check()
    model.eval()
    mine = [gradients_of(model, t) for t in tokens]
    for name, g in direction.items():  # the objective is ga: minus the NLL
        torch.testing.assert_close(g, -(mine[0][name] + mine[1][name]) / 2, rtol=1e-3, atol=1e-5)
    assert list(products) == list(GROUPS)
    for group in GROUPS:
        for i, own in enumerate(mine):
            expected = sum(float((g * direction[n]).sum()) for n, g in own.items() if groups[n] == group)
            assert products[group][i] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    whole = [torch.cat([g.flatten() for g in own.values()]).numpy() for own in mine]
    effect = float(whole[0] @ np.concatenate([g.flatten().numpy() for g in direction.values()]))
    assert sum(products[group][0] for group in GROUPS) == pytest.approx(effect, rel=1e-3)
    assert effect < 0


def test_batches_change_nothing_in_a_mean_gradient(pair):
    """Five at once, or two by two; every example weighs the same, however long."""
    model, tokens = pair
    one, two = (mean_gradient(model, tokens, batch_size=size) for size in (5, 2))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-6)


def test_no_more_than_one_parameter_s_gradient_lives():
    """While the backward pass goes on, of all parameters at most the one that was just finished has a gradient."""
    tokenizer, make, rows = llama()
    model = make(len(tokenizer))
    tokens = encode(read_examples(rows, role="forget"), tokenizer, role="forget", max_length=None)
    most, handles = [], []
    for p in model.parameters():
        handles.append(
            p.register_post_accumulate_grad_hook(
                lambda _: most.append(sum(q.grad is not None for q in model.parameters()))
            )
        )
    gradient_norms(model, tokens)
    assert len(most) == len(tokens) * len(list(model.parameters()))
    assert max(most) == 1


def test_a_parameter_that_an_example_does_not_touch_counts_nothing_for_it():
    """As an expert that no token is sent to: not what it counted for the example before."""
    tokenizer, make, _ = llama()
    torch.manual_seed(0)
    model = make(len(tokenizer)).eval()
    tokens = encode(read_examples(tiny.facts(5, 1), role="forget"), tokenizer, role="forget", max_length=None)
    shortest = min(len(t) for t in tokens)
    model.model.layers[0].mlp.register_forward_hook(lambda _, x, y: y.detach() if x[0].shape[1] == shortest else y)
    expected = [torch.cat([g.flatten() for g in gradients_of(model, t).values()]).norm().item() for t in tokens]
    assert any(len(t) > shortest for t in tokens)
    np.testing.assert_allclose(gradient_norms(model, tokens), expected, rtol=1e-4)


def test_groups_are_thirds_of_the_blocks_and_a_tied_head_is_the_embedding():
    """Six blocks; a head of its own; LoRA-like freezing keeps a block where it stands."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 11}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=6, **sizes))
    groups = layer_groups(model)
    by_block = [groups[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(6)]
    assert by_block == ["first third"] * 2 + ["middle third"] * 2 + ["last third"] * 2
    assert groups["model.embed_tokens.weight"] == "embed"
    assert groups["lm_head.weight"] == groups["model.norm.weight"] == "head"
    for name, p in model.named_parameters():
        p.requires_grad = name.startswith("model.layers.5.mlp")
    assert set(layer_groups(model).values()) == {"last third"}
    tied = layer_groups(tiny.tiny_gpt2(400))
    assert tied["transformer.wte.weight"] == tied["transformer.wpe.weight"] == "embed"
    assert "lm_head.weight" not in tied
    model.requires_grad_(False)
    with pytest.raises(ModelError, match="no parameter that trains"):
        layer_groups(model)


def test_a_direction_that_misses_a_parameter_is_refused(pair):
    """By name; and so is nothing to measure."""
    model, tokens = pair
    direction = mean_gradient(model, tokens)
    first = next(iter(direction))
    del direction[first]
    with pytest.raises(ArgumentError, match=f"none for {first}"):
        gradient_inner_products(model, tokens, direction)
    with pytest.raises(ArgumentError, match="at least one example"):
        gradient_norms(model, [])


# ---------------------------------------------------------------- representations


def test_representations_are_means_over_the_scored_positions(pair):
    """hidden: the head's input, which gives the model's own logits; scores: the gradient of the likelihood there."""
    model, tokens = pair
    check = unchanged(model)
    rows = representations(model, tokens, batch_size=2)
    check()
    model.eval()
    for i, t in enumerate(tokens):
        seen = []
        head = unwrapped(model).get_output_embeddings()
        handle = head.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        logits = logits_of(model, t)
        handle.remove()
        states = seen[0][0, t.first - 1 : -1] if t.decoder is None else seen[0][0, t.first :]
        np.testing.assert_allclose(rows.hidden[i], states.mean(0).detach(), atol=1e-5)
        error = torch.nn.functional.one_hot(torch.tensor(t.scored), logits.shape[-1]) - logits.softmax(-1)
        np.testing.assert_allclose(rows.scores[i], (error @ head.weight).mean(0).detach(), atol=1e-5)


def test_a_head_without_plain_weights_is_refused():
    """An adapter on it, say."""
    tokenizer, make, rows = llama()
    model = make(len(tokenizer))
    tokens = encode(read_examples(rows, role="forget"), tokenizer, role="forget", max_length=None)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ModelError, match="hidden states cannot be read"):
        representations(model, tokens)


# ---------------------------------------------------------------- subset masks


@pytest.mark.parametrize(("count", "fraction", "inside"), [(2, 0.5, 1), (8, 0.25, 2), (7, 0.7, 5)])
def test_every_example_is_in_as_many_models_as_asked_and_out_of_the_others(count, fraction, inside):
    """Exactly; at random, by seed, and not all together."""
    mask = subset_masks(40, count=count, fraction=fraction, seed=1)
    assert mask.shape == (count, 40)
    assert (mask.sum(axis=0) == inside).all()
    assert len({tuple(column) for column in mask.T.tolist()}) > 1
    assert (mask == subset_masks(40, count=count, fraction=fraction, seed=1)).all()
    assert (mask != subset_masks(40, count=count, fraction=fraction, seed=2)).any()


def test_masks_that_leave_an_example_in_all_or_none_are_refused():
    """No counterfactual without both halves."""
    for count, fraction in ((1, 0.5), (4, 0.1), (4, 0.95)):
        with pytest.raises(ArgumentError, match="in at least one model and out of one"):
            subset_masks(3, count=count, fraction=fraction)


def test_a_language_model_serves_as_well_as_a_model(pair):
    """The same numbers, with its own workspace, and its fast path is checked once for all calls."""
    model, tokens = pair
    lm = LanguageModel.of(model, needs_tokenizer=False)
    np.testing.assert_array_equal(gradient_norms(lm, tokens), gradient_norms(model, tokens))
    np.testing.assert_array_equal(representations(lm, tokens).hidden, representations(model, tokens).hidden)
    forced, raw = teacher_forced(lm, tokens), teacher_forced(model, tokens)
    np.testing.assert_array_equal(forced.log_likelihood, raw.log_likelihood)
    assert layer_groups(lm) == layer_groups(model)
