"""Steps along inverse Fisher informations: each against the whole matrix in float64, and on a trained model."""

import peft
import pytest
import tiny
import torch
from coverings import grid, in_full
from test_edits import adapted, check_undone, encoded, gpt2, llama, mean_loss, narrow, same, weights
from test_edits_influence import ROWS, flat, mean_loss_wide, small  # noqa: F401
from test_edits_prune import as_rows, linear_layers, t5
from transformers import GPT2Config, GPT2LMHeadModel

from pyunlearn.edits import ekfac, ekfac_step, fisher, fisher_information, fisher_step, woodfisher_step
from pyunlearn.edits.base import Editing
from pyunlearn.edits.curvature import Curvature
from pyunlearn.errors import ArgumentError, ModelError, TrainingError
from pyunlearn.metrics import generalized_exposure

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = {"fisher": fisher_step, "woodfisher": woodfisher_step, "ekfac": ekfac_step}


def gradients(model, tokens):
    """Return (texts, weights): gradients of each text's NLL per token, in the model's own precision."""
    trains = [p for p in model.parameters() if p.requires_grad]
    return torch.stack(
        [torch.cat([g.flatten() for g in torch.autograd.grad(mean_loss_wide(model, [t]), trains)]) for t in tokens]
    )


@torch.no_grad()
def likelihoods(model, trained, rows):
    """Return the NLL per token of each text."""
    return [float(mean_loss(model.eval(), [t])) for t in encoded(trained.tokenizer, rows)]


def direction_of(model, tokenizer, forget, retain, n):
    """Return |F| / n (mean gradient over F - mean gradient over R)."""
    f, r = (gradients(model, encoded(tokenizer, rows)) for rows in (forget, retain))
    return len(f) / n * (f.mean(0) - r.mean(0))


def test_the_direction_is_computed_in_place(monkeypatch):
    """Two gradients at most are in memory: v has the tensors of the first, and those of the second are released."""
    tokenizer, make, rows = llama()
    gradients, mean = [], Editing.gradient
    monkeypatch.setattr(Editing, "gradient", lambda *a: gradients.append(mean(*a)) or gradients[-1])
    with Editing("x", make(len(tokenizer)), {"forget": rows[:2], "retain": rows[2:]}, tokenizer) as edit:
        wanted = [{n: g.clone() for n, g in mean(edit, role).items()} for role in ("forget", "retain")]
        v = fisher_information.direction(edit, 8)
    assert gradients == [{}, {}]
    for name, part in v.items():
        torch.testing.assert_close(part, 2 / 8 * (wanted[0][name] - wanted[1][name]), rtol=0, atol=0)


# ---------------------------------------------------------------- the diagonal


@pytest.mark.full
def test_labels_are_drawn_from_the_model_and_their_squares_are_the_gauss_newton_diagonal(small):  # noqa: F811
    """The diagonal is that of the mean NLL per token; the texts' own labels would give another one."""
    model, tokenizer = small
    with Editing("x", model, {"retain": ROWS[2:]}, tokenizer) as edit:
        product, shapes = (
            Curvature(edit, ["retain"], "gauss-newton"),
            [p.shape for p in edit.parameters.values()],
        )
        wanted = []
        for e in torch.eye(len(flat(model)), dtype=torch.float64):
            column = product(
                [part.view(s) for part, s in zip(e.split([s.numel() for s in shapes]), shapes, strict=True)]
            )
            wanted.append(torch.cat([c.flatten() for c in column]) @ e)
        wanted = torch.stack(wanted)
        diagonal = torch.cat([d.flatten() for d in fisher._diagonal(edit, 50, 0).values()])
    empirical = (gradients(model, encoded(tokenizer, ROWS[2:])) ** 2).mean(0)
    assert float(diagonal.sum()) == pytest.approx(float(wanted.sum()), rel=0.15)
    assert float((diagonal - wanted).norm() / wanted.norm()) < 0.25
    assert float((empirical - wanted).norm() / wanted.norm()) > 0.5


def test_drawn_labels_have_the_model_s_probabilities(monkeypatch):
    """Each by its probability, and another seed draws others."""
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]]).repeat(4000, 1).double().requires_grad_()
    monkeypatch.setattr(fisher_information, "wide_logits", lambda *_: logits)

    class Batch:
        counts, example = torch.tensor([4000]), torch.zeros(4000, dtype=torch.int64)

    counted = []
    for seed in (0, 1):
        logits.grad = None
        fisher_information.drawn_loss(None, Batch, [1.0], torch.Generator().manual_seed(seed)).backward()
        p = logits.detach()[0].softmax(-1)
        labels = ((p - logits.grad * 4000**0.5) > 0.5).double()  # the gradient is (p - one hot) / sqrt(T)
        assert bool((labels.sum(1) == 1).all())
        torch.testing.assert_close(labels.mean(0), p, atol=0.03, rtol=0)
        counted.append(labels)
    assert not torch.equal(*counted)
    whole, quarter = (
        fisher_information.drawn_loss(None, Batch, [share], torch.Generator().manual_seed(0)).item()
        for share in (1.0, 0.25)
    )
    assert quarter == pytest.approx(whole / 2)  # of a window of a quarter of a text: its square counts a quarter


def test_a_diagonal_step_is_its_formula(small, monkeypatch):  # noqa: F811
    """theta + rate v / (D + damping), with a default damping of 0.1 times D's mean; then undone."""
    model, tokenizer = small
    x = flat(model)
    d = torch.rand(len(x), generator=torch.Generator().manual_seed(0)).double()
    parts = [p for p in model.parameters() if p.requires_grad]

    def fixed_diagonal(edit, *_):
        split = zip(edit.parameters.items(), d.split([p.numel() for p in parts]), strict=True)
        return {name: part.view(p.shape).clone() for (name, p), part in split}

    monkeypatch.setattr(fisher, "_diagonal", fixed_diagonal)
    for damping in (None, 0.3):
        v = direction_of(model, tokenizer, ROWS[:2], ROWS[2:], 50)
        edited = fisher_step(
            model, ROWS[:2], retain=ROWS[2:], rate=0.5, damping=damping, training_texts=50, tokenizer=tokenizer
        )
        step = 0.5 * v / (d + (0.1 * d.mean() if damping is None else damping))
        torch.testing.assert_close(flat(model) - x, step, rtol=1e-3, atol=1e-5 * float(step.abs().max()))
        assert edited.diagnostics["step_norm"] == pytest.approx(float(step.norm()), rel=1e-3)
        assert edited.diagnostics["damping"] == pytest.approx(float(0.1 * d.mean()) if damping is None else 0.3)
        edited.undo()


# ---------------------------------------------------------------- WoodFisher


def woodfisher_inverse(g, damping):
    """Compute the recursion of the source with whole matrices, one text after the other."""
    inverse = torch.eye(g.shape[1], dtype=g.dtype) / damping
    for row in g:
        o = inverse @ row
        inverse = inverse - torch.outer(o, o) / (len(g) + row @ o)
    return inverse


@pytest.mark.full
@pytest.mark.parametrize("damping", [None, 0.01])
def test_woodfisher_is_its_recursion_over_all_texts(small, damping):  # noqa: F811
    """The step is theta + rate (1/m G^T G + damping I)^-1 v, with the inverse of the whole matrix."""
    model, tokenizer = small
    x, g = flat(model), gradients(model, encoded(tokenizer, ROWS[2:]))
    wanted = 0.1 * float((g**2).sum()) / len(g) ** 2 if damping is None else damping
    inverse = woodfisher_inverse(g, wanted)
    matrix = g.T @ g / len(g) + wanted * torch.eye(len(x), dtype=x.dtype)
    torch.testing.assert_close(inverse @ matrix, torch.eye(len(x), dtype=x.dtype))
    step = 0.5 * inverse @ direction_of(model, tokenizer, ROWS[:2], ROWS[2:], 7)
    edited = woodfisher_step(
        model, ROWS[:2], retain=ROWS[2:], rate=0.5, damping=damping, tolerance=1e-6, batch_size=2, tokenizer=tokenizer
    )
    torch.testing.assert_close(flat(model) - x, step, rtol=1e-3, atol=1e-4 * float(step.abs().max()))
    assert edited.diagnostics["damping"] == pytest.approx(wanted, rel=1e-4)
    assert edited.diagnostics["converged"]
    assert edited.diagnostics["iterations"] <= len(g) + 1
    edited.undo()


# ---------------------------------------------------------------- EK-FAC


def small_gpt2():
    """Make a GPT-2 in float64: Conv1D, with biases."""
    torch.manual_seed(0)
    tokenizer = tiny.make_tokenizer(form="$A", pad=False)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=8,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.5,
        n_inner=12,
    )
    model = GPT2LMHeadModel(config).double().eval()
    model.transformer.h[0].mlp.c_proj.bias.requires_grad_(False)
    return model, tokenizer, tiny.facts(7, 4)


def fixed_loss(edit, batch, shares, generator):
    """Compute drawn_loss with labels that a test knows."""
    labels = (batch.targets + 1) % 50
    log_likelihood = edit.lm.likelihood.logits(batch).log_softmax(-1)[range(len(labels)), labels]
    return -(log_likelihood * batch.counts[batch.example].double().rsqrt()).sum()


def dense_step(model, tokenizer, module, weight, bias, forget, retain, damping):
    """Solve with the layer's whole matrix (Qs x Qa) diag(Lambda) (Qs x Qa)^T, and return (out, in (+ 1))."""
    seen, size, outer = {}, [], []
    forward = module.register_forward_hook(lambda m, inputs, out: seen.update(a=inputs[0][0], out=out))
    trains = [weight] if bias is None else [weight, bias]
    cov_a = cov_s = 0
    for t in encoded(tokenizer, retain):
        logits = model(input_ids=torch.tensor([t.ids])).logits[0, t.first - 1 : -1].log_softmax(-1)
        labels = [(i + 1) % 50 for i in t.scored]
        loss = -logits[range(len(labels)), labels].sum() / len(labels) ** 0.5
        *parts, g = torch.autograd.grad(loss, [*trains, seen["out"]])
        joined = as_rows(module, parts[0])
        a = seen["a"]
        if bias is not None:
            joined, a = torch.cat([joined, parts[1][:, None]], 1), torch.cat([a, torch.ones_like(a[:, :1])], 1)
        torch.testing.assert_close(joined, g[0].T @ a)
        size.append(joined)
        cov_a, cov_s = cov_a + a.T @ a, cov_s + g[0].T @ g[0]
    forward.remove()
    q_a, q_s = (torch.linalg.eigh(c.detach()).eigenvectors for c in (cov_a, cov_s))
    basis = torch.kron(q_s, q_a)
    spectrum = torch.stack([(basis.T @ j.flatten()) ** 2 for j in size]).mean(0)
    lam = 0.1 * spectrum.mean() if damping is None else damping
    matrix = basis @ torch.diag(spectrum) @ basis.T + lam * torch.eye(len(basis), dtype=basis.dtype)
    outer = []
    for rows in (forget, retain):
        parts = torch.autograd.grad(mean_loss_wide(model, encoded(tokenizer, rows)), trains)
        joined = as_rows(module, parts[0])
        outer.append(joined if bias is None else torch.cat([joined, parts[1][:, None]], 1))
    v = len(forget) / (len(forget) + len(retain)) * (outer[0] - outer[1])
    return torch.linalg.solve(matrix, v.flatten()).view(v.shape)


@pytest.mark.parametrize("damping", [None, 0.02])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_ekfac_is_the_inverse_of_its_whole_matrix(small, kind, damping, monkeypatch):  # noqa: F811
    """Each layer is solved with its trainable bias, on texts of several lengths; nothing else moves."""
    model, tokenizer, rows = (*small, ROWS) if kind == "llama" else small_gpt2()
    monkeypatch.setattr(ekfac, "drawn_loss", fixed_loss)
    before, wanted = weights(model), {}
    named = dict(model.named_parameters())
    for modules in linear_layers(model).values():
        for name, module in modules.items():
            bias = named.get(name.removesuffix("weight") + "bias")
            bias = bias if bias is not None and bias.requires_grad else None
            if module.weight.requires_grad:
                step = dense_step(model, tokenizer, module, module.weight, bias, rows[:2], rows[2:], damping)
                wanted[name] = as_rows(module, step[:, : step.shape[1] - (bias is not None)])
                if bias is not None:
                    wanted[name.removesuffix("weight") + "bias"] = step[:, -1]
    assert len(wanted) == (2 if kind == "llama" else 7)
    edited = ekfac_step(model, rows[:2], retain=rows[2:], rate=0.5, damping=damping, tokenizer=tokenizer, batch_size=3)
    for name, p in model.named_parameters():
        if name in wanted:
            largest = float(wanted[name].abs().max())
            torch.testing.assert_close(p.detach() - before[name], 0.5 * wanted[name], rtol=2e-3, atol=1e-4 * largest)
        else:
            assert torch.equal(p.detach(), before[name]), name
    assert edited.diagnostics["unread"] == []
    edited.undo()
    assert same(weights(model), before)


# ---------------------------------------------------------------- all of them


@grid(strength=1, make_pair=[llama, gpt2, narrow, adapted, t5], step=[*STEPS])
def test_every_kind_of_model_takes_a_step_and_its_undoing(make_pair, step):
    """Tied heads, dropout, 16 bits, adapters, encoder-decoder: the step is finite, reproducible, and undone exactly."""
    tokenizer, make, rows = make_pair()
    torch.manual_seed(0)
    model = make(len(tokenizer)).train()
    before = weights(model)
    options = {"retain": rows[2:], "tokenizer": tokenizer, "rate": 0.3, "batch_size": 2}
    edited = STEPS[step](model, rows[:2], **options)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert edited.diagnostics["step_norm"] > 0
    assert edited.changed
    after = weights(model)
    check_undone(edited, before, model)
    STEPS[step](model, rows[:2], **options)
    assert same(weights(model), after)


RATES = {"fisher": 0.003, "woodfisher": 0.06, "ekfac": 0.03}


@pytest.mark.parametrize("step", ["fisher", "ekfac", *in_full("woodfisher")])
def test_a_step_of_the_right_length_takes_the_exposure_away_and_little_else(story, step):
    """Exposure falls from the maximum for both texts, below significance for one, at less than 1 % of utility."""
    model, options, retain = story.fresh(), {}, story.retain
    if step == "woodfisher":  # takes each text's gradient in each iteration
        options, retain = {"max_iterations": 6}, retain[:30]
    edited = STEPS[step](
        model,
        story.forget * 12,
        retain=retain,
        training_texts=824,
        rate=RATES[step],
        batch_size=20,
        tokenizer=story.tokenizer,
        **options,
    )
    non_members = likelihoods(story.model, story, story.holdout)
    then, now = (
        generalized_exposure(likelihoods(m, story, story.forget), non_members).lower for m in (story.model, model)
    )
    assert then.min() > 5.9
    assert now.min() < 4.32
    assert now.max() < 5.9
    assert sum(likelihoods(model, story, story.holdout)) < 1.01 * sum(non_members)
    assert edited.nll_after["retain"] < 1.01 * edited.nll_before["retain"]


@pytest.mark.parametrize("step", STEPS)
def test_steps_that_cannot_be_are_refused_and_nothing_is_changed(step):
    """No retain, and numbers out of range."""
    tokenizer, make, rows = llama()
    model = make(len(tokenizer))
    before = weights(model)
    for options, message in (
        ({"retain": None}, "pass retain="),
        ({"rate": 0}, "rate must be a number, above 0"),
        ({"damping": -1}, "damping must be a number, above 0"),
        ({"training_texts": 0}, "training_texts must be a whole number, 1 or more"),
    ):
        with pytest.raises(ArgumentError, match=message):
            STEPS[step](model, rows[:2], **{"retain": rows[2:], "tokenizer": tokenizer, **options})
    assert same(weights(model), before)


def test_layers_that_no_gradient_reaches_are_left_alone_and_one_without_curvature_is_refused(monkeypatch):
    """lora_A stays while lora_B is 0; a gradient without curvature needs a damping."""
    tokenizer, make, rows = llama()
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(make(len(tokenizer)), config)
    before = weights(model)
    edited = ekfac_step(model, rows[:2], retain=rows[2:], tokenizer=tokenizer)
    assert len(edited.diagnostics["unread"]) == 4
    assert all("lora_A" in name for name in edited.diagnostics["unread"])
    assert len(edited.changed) == 4
    assert all("lora_B" in name for name in edited.changed)
    edited.undo()
    real = ekfac._eigenvalues
    monkeypatch.setattr(ekfac, "_eigenvalues", lambda *a: {n: torch.zeros_like(x) for n, x in real(*a).items()})
    with pytest.raises(TrainingError, match="give a damping"):
        ekfac_step(model, rows[:2], retain=rows[2:], tokenizer=tokenizer)
    assert same(weights(model), before)
    assert ekfac_step(model, rows[:2], retain=rows[2:], damping=0.1, tokenizer=tokenizer).changed
    model.requires_grad_(False).get_output_embeddings().weight.requires_grad_(True)
    with pytest.raises(ModelError, match="none of them is trainable"):
        ekfac_step(model, rows[:2], retain=rows[2:], tokenizer=tokenizer)
