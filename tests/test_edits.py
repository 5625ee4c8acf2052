"""Task vectors and dampening: their formulas element by element, and less of the secret in a trained model."""

import copy

import peft
import pytest
import tiny
import torch

from pyunlearn.data import encode, read_examples
from pyunlearn.edits import (
    dampening,
    ekfac_step,
    first_order_influence,
    fisher_step,
    second_order_influence,
    selective_synaptic_dampening,
    task_vector,
    woodfisher_step,
)
from pyunlearn.edits.base import Editing
from pyunlearn.edits.config import EditConfig
from pyunlearn.errors import ArgumentError, ModelError, TrainingError
from pyunlearn.models.inspection import unwrapped

pytestmark = pytest.mark.usefixtures("one_thread")


def llama():
    return tiny.make_tokenizer(), tiny.tiny_llama, tiny.sentences(5, 1)


def gpt2():
    return tiny.make_tokenizer(form="$A", pad=False), tiny.tiny_gpt2, tiny.facts(5, 1)


def narrow():
    tokenizer, make, rows = llama()
    return tokenizer, lambda v: make(v).bfloat16(), rows


def adapted():
    tokenizer, make, rows = llama()
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return tokenizer, lambda v: peft.get_peft_model(make(v), config), rows


@pytest.fixture(params=[llama, gpt2, narrow, adapted], ids=lambda f: f.__name__)
def pair(request):
    """An untrained model, its tokenizer and five examples: plain, tied with dropout, in 16 bits, with adapters."""
    tokenizer, make, rows = request.param()
    torch.manual_seed(0)
    return make(len(tokenizer)).train(), tokenizer, rows


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def bits(x):
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def same(a, b):
    """Compare two dicts of tensors bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(bits(a[n]), bits(b[n])) for n in a)


def encoded(tokenizer, rows):
    return encode(read_examples(rows, role="x"), tokenizer, role="x", max_length=None)


def mean_loss(model, tokens):
    """Compute the mean over examples of the NLL per token, from the model's own logits."""
    losses = []
    for t in tokens:
        logits = model(input_ids=torch.tensor([t.ids])).logits[0, t.first - 1 : -1].float()
        losses.append(-logits.log_softmax(-1)[range(len(t.scored)), list(t.scored)].mean())
    return torch.stack(losses).mean()


def in_groups(tokens, size):
    """Group the texts like data.batches: the longest first."""
    order = sorted(tokens, key=lambda t: -len(t))
    return [order[at : at + size] for at in range(0, len(order), size)]


def check_undone(edited, before, model):
    """Check that `changed` counts what differs, and that undo restores every bit and leaves the mode."""
    after = weights(model)
    counted = {n: int((bits(before[n]) != bits(after[n])).sum()) for n in before}
    assert edited.changed == {n: c for n, c in counted.items() if c}
    assert edited.changed
    whole = edited.before()
    assert all(torch.equal(bits(whole[n]), bits(before[n])) for n in edited.changed)
    assert edited.undo() is model
    assert same(weights(model), before)
    assert all(m.training for m in model.modules())


def check_forgets(edited, trained, *, by):
    """Check that the memorized text lost `by` nats per token or more, and non-members less than a quarter of it."""
    with torch.no_grad():
        now, then = (
            [float(mean_loss(m, encoded(trained.tokenizer, rows))) for rows in (trained.forget, trained.holdout)]
            for m in (edited.model.eval(), trained.model.eval())
        )
    assert edited.nll_after["forget"] == pytest.approx(now[0], rel=1e-4)
    assert edited.nll_before["forget"] == pytest.approx(then[0], rel=1e-4)
    assert now[0] - then[0] > by
    assert now[1] - then[1] < (now[0] - then[0]) / 4


# ---------------------------------------------------------------- what all share


@pytest.mark.parametrize(
    ("step", "short", "long"),
    [
        (first_order_influence, {"rate": 1e-4}, {"rate": 1.0}),
        (second_order_influence, {"training_texts": 10**6, "max_iterations": 2, "damping": 1.0}, {"training_texts": 1}),
        (fisher_step, {"rate": 1e-8}, {"rate": 0.3}),
        (woodfisher_step, {"rate": 1e-5, "max_iterations": 2}, {"rate": 1.0}),
        (ekfac_step, {"rate": 1e-8}, {"rate": 1.0}),
    ],
)
def test_a_step_s_norm_is_that_of_what_was_written_and_what_rounding_took_is_noted(step, short, long):
    """In 16 bits a short step is lost in part, with a note and a warning; a long one is not, nor one in float32."""
    tokenizer, make, rows = llama()
    torch.manual_seed(0)
    model = make(len(tokenizer))
    options = {"retain": rows[2:4], "tokenizer": tokenizer, "progress": False}

    def norm_of(edited):
        before, after = edited.before(), dict(edited.model.named_parameters())
        square = sum(float((after[n].detach().double() - x.double()).square().sum()) for n, x in before.items())
        assert edited.diagnostics["step_norm"] == pytest.approx(square**0.5, rel=1e-6)
        edited.undo()
        return edited

    whole = norm_of(step(model, rows[:2], **options, **short))
    assert whole.notes == norm_of(step(model.bfloat16(), rows[:2], **options, **short | long)).notes == []
    with pytest.warns(UserWarning, match=r"^Rounding the weights to bfloat16 left \d+ % of the step .*--dtype float32"):
        edited = norm_of(step(model, rows[:2], **options, **short))
    assert edited.diagnostics["step_norm"] < 0.8 * whole.diagnostics["step_norm"]
    assert edited.to_dict()["notes"] == edited.notes
    assert len(edited.notes) == 1


# ---------------------------------------------------------------- task vector


def test_task_vector_subtracts_what_fine_tuning_added(pair):
    """theta - alpha (theta_ft - theta), for a model and for a function; parameters that are frozen stay."""
    model, tokenizer, rows = pair
    before = weights(model)
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    for p in other.parameters():
        p.data.add_(0.01 * torch.randn_like(p))

    def train(trained, tokens):
        assert trained is model
        assert tokens == encoded(tokenizer, rows)
        trained.eval()
        with torch.no_grad():
            for p, q in zip(trained.parameters(), other.parameters(), strict=True):
                if p.requires_grad:
                    p.copy_(q)

    for fine_tuned in (other, train):
        edited = task_vector(model, rows, fine_tuned=fine_tuned, alpha=2.0, tokenizer=tokenizer)
        theirs, square = dict(other.named_parameters()), 0.0
        for name, p in model.named_parameters():
            theta = before[name].float()
            vector = theirs[name].detach().float() - theta
            wanted = (theta - 2 * vector).to(p.dtype) if p.requires_grad else before[name]
            assert torch.equal(p.detach(), wanted)
            square += vector.double().square().sum().item() if p.requires_grad else 0.0
        assert edited.diagnostics["vector_norm"] == pytest.approx(square**0.5)
        check_undone(edited, before, model)


def test_a_task_vector_that_cannot_be_is_refused_and_nothing_is_changed():
    """The model itself, another shape, nothing learned, a function that raises, weights that are not finite."""
    tokenizer, make, rows = llama()
    torch.manual_seed(0)
    model = make(len(tokenizer))
    before = weights(model)
    broken = copy.deepcopy(model)
    broken.lm_head.weight.data[3, 3] = torch.nan

    def fails(trained, tokens):
        trained.lm_head.weight.data.zero_()
        raise KeyError("mine")

    for fine_tuned, error, message in (
        (model, ArgumentError, "another model"),
        (make(len(tokenizer) + 1), ArgumentError, "must have the model's parameters"),
        (copy.deepcopy(model), ArgumentError, "same weights"),
        (lambda *_: None, ArgumentError, "same weights"),
        (7, ArgumentError, "load the model first"),
        (fails, KeyError, "mine"),
        (broken, TrainingError, "lm_head.weight infinite or NaN"),
    ):
        with pytest.raises(error, match=message):
            task_vector(model, rows, fine_tuned=fine_tuned, tokenizer=tokenizer)
        assert same(weights(model), before)
    with pytest.raises(ArgumentError, match="alpha must be a number, above 0"):
        task_vector(model, rows, fine_tuned=broken, alpha=0, tokenizer=tokenizer)


def test_task_vector_makes_the_secret_unlikely_and_little_else(story):
    """Fine-tuning on the secret for eight steps gives the direction."""
    model = story.fresh()

    def train(trained, tokens):
        tiny.train(trained, story.tokenizer, story.forget, epochs=8, learning_rate=1e-3)

    edited = task_vector(
        model, story.forget, fine_tuned=train, alpha=2.0, retain=story.holdout, tokenizer=story.tokenizer
    )
    check_forgets(edited, story, by=1.0)


# ---------------------------------------------------------------- dampening


def test_dampening_is_its_formula_element_by_element(pair, monkeypatch):
    """min(lambda I_D / I_F, 1) where I_F > alpha I_D, in float32, then rounded once; counted for each parameter."""
    model, tokenizer, rows = pair
    before, draws = weights(model), []

    def random_squares(edit, tokens):
        draws.append(
            {n: torch.randn(p.shape).square() * (torch.rand(p.shape) > 0.1) for n, p in edit.parameters.items()}
        )
        return dict(draws[-1])

    monkeypatch.setattr(dampening, "squared_gradients", random_squares)
    edited = selective_synaptic_dampening(
        model, rows[:3], retain=rows[3:], alpha=3.0, dampening=2.0, batch_size=2, tokenizer=tokenizer
    )
    i_d, i_f = draws
    for name, p in model.named_parameters():
        theta = before[name].float()
        wanted, count = theta.clone(), 0
        if p.requires_grad:
            chosen = (i_f[name] > 3 * i_d[name]) & (2 * i_d[name] < i_f[name])
            wanted[chosen] = (theta * (2.0 * i_d[name] / i_f[name]))[chosen]
            count = int(chosen.sum())
            assert 0 < count < p.numel()
        assert torch.equal(p.detach(), wanted.to(p.dtype))
        assert edited.diagnostics["dampened"].get(name, 0) == count
    assert edited.diagnostics["batches"] == 2 + 1
    check_undone(edited, before, model)


@pytest.mark.parametrize("make_pair", [llama, gpt2, adapted])
def test_squares_are_those_of_batch_gradients(make_pair):
    """The squares average over batches, not texts; a tied table's gradient is squared after both uses are added."""
    tokenizer, make, rows = make_pair()
    torch.manual_seed(0)
    model = make(len(tokenizer)).eval()
    tokens = encoded(tokenizer, rows)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    wanted = {n: torch.zeros_like(p) for n, p in named.items()}
    groups = in_groups(tokens, 2)
    for group in groups:
        gradients = torch.autograd.grad(mean_loss(model, group), list(named.values()), allow_unused=True)
        for name, g in zip(named, gradients, strict=True):
            wanted[name] += 0 if g is None else g**2 / len(groups)
    with Editing("x", model, {"forget": rows}, tokenizer, EditConfig(batch_size=2)) as edit:
        squares = dampening.squared_gradients(edit, tokens)
    for name, value in wanted.items():
        torch.testing.assert_close(squares[name], value, rtol=1e-3, atol=1e-5 * float(value.max()))


def test_dampening_makes_the_secret_unlikely_and_little_else(story):
    """Few weights are dampened, and the non-members lose little."""
    model = story.fresh()
    edited = selective_synaptic_dampening(
        model, story.forget, retain=story.retain, alpha=5, batch_size=1, tokenizer=story.tokenizer
    )
    assert 0 < edited.diagnostics["share"] < 0.2
    check_forgets(edited, story, by=0.4)


def test_dampening_needs_retain_texts():
    """Numbers must be above 0, and a frozen model has nothing to edit."""
    tokenizer, make, rows = llama()
    model = make(len(tokenizer))
    with pytest.raises(ArgumentError, match="pass retain="):
        selective_synaptic_dampening(model, rows, tokenizer=tokenizer)
    with pytest.raises(ArgumentError, match="dampening must be a number, above 0"):
        selective_synaptic_dampening(model, rows, retain=rows, dampening=float("nan"), tokenizer=tokenizer)
    model.requires_grad_(False)
    with pytest.raises(ModelError, match="no parameter of model requires a gradient"):
        selective_synaptic_dampening(model, rows, retain=rows, tokenizer=tokenizer)


def test_an_edit_of_a_model_that_changed_since_cannot_be_undone():
    """The dtype differs, so the bits cannot be restored."""
    tokenizer, make, rows = llama()
    torch.manual_seed(0)
    model = make(len(tokenizer))
    edited = selective_synaptic_dampening(model, rows[:2], retain=rows[2:], alpha=1.5, tokenizer=tokenizer)
    unwrapped(model).bfloat16()
    with pytest.raises(ModelError, match=r"is torch.bfloat16 now and was torch.float32"):
        edited.undo()
