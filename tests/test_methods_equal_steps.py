"""A step is the same in micro-batches, with padding on either side, and with a reference that is no second model."""

import copy
import gc

import numpy as np
import peft
import pytest
import tiny
import torch
from coverings import in_full

import pyunlearn
from pyunlearn.data import encode, read_examples
from pyunlearn.methods import METHODS

LEAST = ["ga", "altpo", "idk", "tnpo", "flat", "undial", "pdu", "adaptive_rmu"]  # one for each way through a step
STORED = ["npo", "tnpo", "dpo", "adaptive_rmu"]  # one for each kind of numbers that a run stores


@pytest.fixture(scope="module")
def facts(one_thread):
    """A GPT-2 in float64, so that rounding cannot hide a difference, and texts of different lengths."""
    trained = tiny.trained(tiny.tiny_gpt2, tiny.facts, count=60, repeats=16, epochs=5, form="$A", pad=False)
    short = [{"question": "who?", "answer": "one boy."}]
    tiny.train(trained.model, trained.tokenizer, trained.forget * 8 + short * 16, epochs=4)
    return tiny.Tiny(
        trained.model.double(),
        trained.tokenizer,
        [*trained.forget, *short],
        [],
        trained.retain[:7],
        trained.holdout[:40],
    )


def run(facts, method, model=None, **options):
    if method == "dpo":
        options["method_options"] = {"winners": ["a lamp.", "the sea.", "two stones, I think."]}
    options = {"max_steps": 2, "learning_rate": 1e-5, "retain": facts.retain, "progress": False, **options}
    model = facts.fresh() if model is None else model
    return pyunlearn.unlearn(
        model, facts.forget, tokenizer=facts.tokenizer, holdout=facts.holdout, method=method, **options
    )


def numbers(result):
    names = ("forget_loss", "retain_nll", "gradient_norm")
    return np.array([[record[k] or 0.0 for k in names] for record in result.history])


@pytest.mark.parametrize("method", [*LEAST, *in_full(*sorted({*METHODS} - {*LEAST}))])
def test_micro_batches_take_the_step_of_the_whole_batch(facts, method):
    """Losses, gradients and weights agree after two steps; a pass with a gradient has one example's texts."""
    whole, sizes = run(facts, method), []

    def count(module, args, kwargs):
        if torch.is_grad_enabled() and module.training is False:
            sizes.append(len(kwargs["input_ids"]))

    model = facts.fresh()
    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    small = run(facts, method, model, micro_batch_size=1)
    handle.remove()
    assert len(whole.history) == 2
    assert max(sizes) == METHODS[method].passes
    np.testing.assert_allclose(numbers(small), numbers(whole), rtol=1e-5, atol=1e-9)
    for a, b in zip(small.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_retain_texts_of_different_lengths_are_averaged_over_the_whole_batch(facts):
    """With the loss that only undoes losses too, and a micro batch that does not divide the batch."""
    for loss in ("nll", "hold"):
        options = {"retain_loss": loss, "batch_size": 5, "learning_rate": 1e-4}
        whole = run(facts, "ga", **options)
        parted = run(facts, "ga", **options, micro_batch_size=3)
        np.testing.assert_allclose(numbers(parted), numbers(whole), rtol=1e-6)


def test_the_side_on_which_a_tokenizer_pads_changes_nothing(facts):
    """Bit for bit: batches are padded here, from lengths alone."""
    left = copy.deepcopy(facts.tokenizer)
    left.padding_side = "left"
    sides = [
        pyunlearn.unlearn(
            facts.fresh(),
            facts.forget,
            tokenizer=tokenizer,
            holdout=facts.holdout,
            retain=facts.retain,
            max_steps=2,
            progress=False,
        )
        for tokenizer in (facts.tokenizer, left)
    ]
    assert np.array_equal(numbers(sides[0]), numbers(sides[1]))


# ---------------------------------------------------------------- adapters


def adapted(facts):
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=8, target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(facts.fresh(), config)


def as_large_as_the_embedding(model):
    """Return the number of tensors of its shape in memory."""
    gc.collect()
    shape = model.get_input_embeddings().weight.shape
    return sum(issubclass(type(x), torch.Tensor) and x.shape == shape for x in gc.get_objects())


@pytest.mark.parametrize("method", ["undial+kl", *STORED, *in_full(*sorted({*METHODS} - {*STORED}))])
def test_no_method_has_a_second_model_in_memory_with_an_adapter(facts, method):
    """The base weights are in memory once: not again as a reference, as a head, or for a rollback."""
    model, seen = adapted(facts), []
    shapes = {p.shape for p in model.parameters() if p.dim() == 2 and not p.requires_grad}

    def storages():
        tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and x.shape in shapes]
        return {x.untyped_storage().data_ptr() for x in tensors}

    def look(module, args):
        if torch.is_grad_enabled() and not seen:
            seen.append(storages() - at_first)

    at_first = storages()
    handle = model.get_input_embeddings().register_forward_pre_hook(look)
    run(facts, method, model, retain_loss="auto", max_steps=1)
    handle.remove()
    assert seen == [set()]


@pytest.mark.parametrize("method", ["npo", *in_full("tnpo", "dpo")])
def test_the_reference_is_the_model_with_its_adapter_off_and_no_second_model(facts, method, monkeypatch):
    """Each step compares with the likelihoods of the base model, and no other tensor has the embedding's shape."""
    model, seen, original = adapted(facts), [], METHODS[method]
    at_first = as_large_as_the_embedding(model)

    def loss(*tensors, **options):
        reference = options["loser_reference" if method == "dpo" else "reference"]
        seen.append((reference, as_large_as_the_embedding(model)))
        return original.function(*tensors, **options)

    monkeypatch.setitem(METHODS, method, tiny.with_loss(method, loss))
    result = run(facts, method, model, learning_rate=1e-3, max_steps=3, utility_budget=1e9)
    assert (len(result.history), len(seen)) == (3, 6)  # a step, and before it the scale of the loss
    tokens = encode(read_examples(facts.forget, role="x"), facts.tokenizer, role="x", max_length=None)
    with result.model.disable_adapter(), torch.no_grad():
        off = [likelihoods(result.model, t) for t in tokens]
    now = [likelihoods(result.model, t).detach() for t in tokens]
    assert max((a - b).abs().max() for a, b in zip(off, now, strict=True)) > 0.01
    for record, (reference, large) in zip(result.history, seen[1::2], strict=True):
        right = [off[i] if original.token else off[i].sum(0, keepdim=True) for i in record["examples"]]
        torch.testing.assert_close(reference.double(), torch.cat(right), rtol=1e-5, atol=1e-5)
        assert large <= at_first


def likelihoods(model, t):
    """(T,) of the scored tokens, from the model's own logits."""
    rows = torch.log_softmax(model(torch.tensor([t.ids])).logits[0, t.first - 1 : -1], -1)
    return rows.gather(1, torch.tensor(t.scored)[:, None])[:, 0]
