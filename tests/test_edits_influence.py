"""Influence: products against torch.func in float64, solvers against torch.linalg.solve, steps on a trained model."""

import pytest
import tiny
import torch
from test_edits import adapted, check_forgets, encoded, gpt2, llama, mean_loss, narrow, same, weights
from torch.func import functional_call, grad, jacfwd
from transformers import LlamaConfig, LlamaForCausalLM

from pyunlearn.edits import first_order_influence, fisher_information, second_order_influence, woodfisher
from pyunlearn.edits.base import Editing
from pyunlearn.edits.config import EditConfig
from pyunlearn.edits.curvature import Curvature
from pyunlearn.edits.solvers import conjugate_gradients, lissa
from pyunlearn.errors import ArgumentError, TrainingError

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = tiny.sentences(7, 4)


@pytest.fixture(scope="module")
def small():
    """A Llama in float64 of which two matrices train: 96 weights, so that every matrix can be formed."""
    torch.manual_seed(0)
    tokenizer = tiny.make_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=4,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
            initializer_range=0.5,
            attn_implementation="eager",
        )
    ).double()
    for name, p in model.named_parameters():
        p.requires_grad = name.endswith(("0.self_attn.q_proj.weight", "1.mlp.up_proj.weight"))
    return model, tokenizer


def matrices(model, tokens):
    """Compute the Hessian and Gauss-Newton matrix of the mean loss, in forward mode over torch.func's gradient."""
    named = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    shapes = [(n, p.shape) for n, p in named.items()]

    def unflat(x):
        parts = x.split([s.numel() for _, s in shapes])
        return {n: part.view(s) for (n, s), part in zip(shapes, parts, strict=True)}

    def logits(x, t):
        return functional_call(model, unflat(x), (torch.tensor([t.ids]),)).logits[0, t.first - 1 : -1]

    def loss(x):
        return sum(-logits(x, t).log_softmax(-1)[range(len(t.scored)), list(t.scored)].mean() for t in tokens) / len(
            tokens
        )

    x = torch.cat([p.flatten() for p in named.values()])
    hessian = jacfwd(grad(loss))(x)
    gauss_newton = torch.zeros_like(hessian)
    for t in tokens:
        jacobian = jacfwd(lambda x, t=t: logits(x, t))(x).movedim(-1, 0)  # (P, T, V)
        p = logits(x, t).softmax(-1)
        middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        gauss_newton += torch.einsum("atv,tvw,btw->ab", jacobian, middle, jacobian) / len(t.scored) / len(tokens)
    return {"hessian": hessian, "gauss-newton": gauss_newton}, x, grad(loss)(x)


@pytest.fixture(scope="module")
def truth(small):
    model, tokenizer = small
    return matrices(model, encoded(tokenizer, ROWS[2:]))


def mean_loss_wide(model, tokens):
    """Compute mean_loss without its rounding to float32."""
    losses = []
    for t in tokens:
        logits = model(input_ids=torch.tensor([t.ids])).logits[0, t.first - 1 : -1]
        losses.append(-logits.log_softmax(-1)[range(len(t.scored)), list(t.scored)].mean())
    return torch.stack(losses).mean()


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


# ---------------------------------------------------------------- products and solvers


@pytest.mark.parametrize("kind", ["hessian", "gauss-newton"])
def test_products_are_those_of_the_whole_matrix(small, truth, kind):
    """Every seventh column, in batches of two, with damping; this Hessian has a negative eigenvalue."""
    model, tokenizer = small
    wanted = truth[0][kind]
    with Editing("x", model, {"forget": ROWS[2:]}, tokenizer, EditConfig(batch_size=2)) as edit:
        product = Curvature(edit, ["forget"], kind, damping=0.25)
        shapes = [p.shape for p in edit.parameters.values()]
        for e, column in list(zip(torch.eye(len(wanted), dtype=torch.float64), wanted, strict=True))[::7]:
            vector = [part.view(s) for part, s in zip(e.split([s.numel() for s in shapes]), shapes, strict=True)]
            computed = torch.cat([part.flatten() for part in product(vector)])
            torch.testing.assert_close(
                computed, column + 0.25 * e, rtol=1e-6, atol=1e-6
            )  # its norms are float32 inside
    lowest = torch.linalg.eigvalsh(wanted)[0]
    assert lowest < -1e-4 if kind == "hessian" else lowest > -1e-10


def test_solvers_solve():
    """Against torch.linalg.solve, for a vector in two parts; `converged` is True where it is."""
    torch.manual_seed(0)
    a = torch.randn(6, 6, dtype=torch.float64)
    a = a @ a.T + torch.eye(6)
    b = torch.randn(6, dtype=torch.float64)
    wanted = torch.linalg.solve(a, b)

    def product(v):
        return list((a @ torch.cat(v)).split([2, 4]))

    scale = 1.1 * float(torch.linalg.eigvalsh(a)[-1])
    for solution in (
        conjugate_gradients(product, list(b.split([2, 4])), tolerance=1e-10, max_iterations=20),
        lissa(lambda u, _: product(u), list(b.split([2, 4])), scale=scale, tolerance=1e-10, max_iterations=2000),
    ):
        assert solution.converged
        torch.testing.assert_close(torch.cat(solution.x), wanted, rtol=1e-7, atol=1e-9)
    assert not conjugate_gradients(product, list(b.split([2, 4])), tolerance=1e-10, max_iterations=2).converged
    with pytest.raises(TrainingError, match="LiSSA does not converge: the residual grew"):
        lissa(lambda u, _: product(u), list(b.split([2, 4])), scale=scale / 4, tolerance=1e-10, max_iterations=2000)
    with pytest.raises(TrainingError, match="met negative curvature"):
        conjugate_gradients(lambda v: [-x for x in product(v)], list(b.split([2, 4])), tolerance=1e-3, max_iterations=9)
    with pytest.raises(TrainingError, match="is not finite"):
        conjugate_gradients(
            lambda v: [x * torch.nan for x in v], list(b.split([2, 4])), tolerance=1e-3, max_iterations=9
        )


# ---------------------------------------------------------------- texts longer than the context

LONG = " ".join(ROWS[:4])


@pytest.fixture
def short_context(small, monkeypatch):
    """The small model and its tokenizer, with a context of half the tokens of LONG."""
    model, tokenizer = small
    monkeypatch.setattr(model.config, "max_position_embeddings", len(tokenizer(LONG)["input_ids"]) // 2)
    return model, tokenizer


def flat_gradient(model, loss):
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]
    )


@pytest.mark.filterwarnings("ignore:Longer than the")
def test_each_record_counts_once_however_many_windows_it_has(short_context):
    """In mean gradients, losses, products, the direction of the Fisher steps and WoodFisher's matrix: by its tokens."""
    model, tokenizer = short_context
    sources = {"forget": [LONG], "retain": [ROWS[4], LONG, ROWS[5]]}
    with Editing("x", model, sources, tokenizer, EditConfig(batch_size=2)) as edit:
        windows = edit.tokens["forget"]
        shares = torch.tensor([len(t.scored) for t in windows], dtype=torch.float64)
        shares /= shares.sum()
        assert len(windows) >= 3
        assert (edit.count("forget"), edit.count("retain"), edit.count("forget", "none")) == (1, 3, 1)
        each = [flat_gradient(model, mean_loss_wide(model, [t])) for t in windows]
        long = shares @ torch.stack(each)
        others = [flat_gradient(model, mean_loss_wide(model, encoded(tokenizer, [row]))) for row in ROWS[4:6]]
        wanted = {
            ("forget",): long,
            ("retain",): (long + sum(others)) / 3,
            ("forget", "retain"): (2 * long + sum(others)) / 4,
        }
        for roles, mean in wanted.items():
            computed = torch.cat([g.flatten() for g in edit.gradient(*roles).values()]).double()
            torch.testing.assert_close(computed, mean, rtol=1e-4, atol=1e-6)
        v = fisher_information.direction(edit, None)
        computed = torch.cat([g.flatten() for g in v.values()])
        torch.testing.assert_close(computed, (long - wanted["retain",]) / 4, rtol=1e-4, atol=1e-6)
        nll = sum(share * float(mean_loss_wide(model, [t]).detach()) for share, t in zip(shares, windows, strict=True))
        assert edit.nll_before["forget"] == pytest.approx(float(nll), rel=1e-5)

        vector = [torch.ones_like(p) for p in edit.parameters.values()]
        both, one, three = (
            torch.cat([x.flatten() for x in Curvature(edit, roles, "gauss-newton")(vector)])
            for roles in (("forget", "retain"), ("forget",), ("retain",))
        )
        torch.testing.assert_close(both, (one + 3 * three) / 4, rtol=1e-5, atol=1e-7)
        rows = torch.stack([*(share**0.5 * g for share, g in zip(shares, each, strict=True)), *others])
        combined = woodfisher._combined(edit, woodfisher._inner(edit, v))
        wanted_product = rows.T @ (rows @ computed)
        torch.testing.assert_close(
            torch.cat([x.flatten() for x in combined.values()]), wanted_product, rtol=1e-3, atol=1e-7
        )
        assert woodfisher._default_damping(edit) == pytest.approx(0.1 * float((rows**2).sum()) / 9, rel=1e-4)


@pytest.mark.filterwarnings("ignore:Longer than the")
@pytest.mark.parametrize("step", [first_order_influence, second_order_influence])
def test_corrected_texts_are_counted_by_record(short_context, step):
    """One may have more windows than its forget text or fewer; a missing one is counted in records."""
    model, tokenizer = short_context
    options = {"retain": ROWS[2:4], "tokenizer": tokenizer, "progress": False}
    step(model, [LONG, ROWS[0]], corrected=[ROWS[1], ROWS[2]], **options).undo()
    step(model, [ROWS[0]], corrected=[LONG], **options).undo()
    with pytest.raises(ArgumentError, match=r"for each of the 2 forget records, in their order, got 1$"):
        step(model, [LONG, ROWS[0]], corrected=[LONG], **options)


# ---------------------------------------------------------------- the steps


@pytest.mark.parametrize("solver", ["cg", "lissa"])
def test_second_order_is_the_closed_form(small, truth, solver):
    """theta - (n (H + damping I))^-1 G, H on retain and corrected texts; LiSSA has all of them in one batch."""
    model, tokenizer = small
    before, start = weights(model), flat(model)
    result = second_order_influence(
        model,
        ROWS[:2],
        corrected=ROWS[2:4],
        retain=ROWS[4:],
        tokenizer=tokenizer,
        solver=solver,
        damping=2.0,
        training_texts=40,
        tolerance=1e-6,
        max_iterations=3000,
        batch_size=5,
    )
    gradient = sum(
        2 * s * matrices_gradient(model, before, tokenizer, rows) for s, rows in ((1, ROWS[2:4]), (-1, ROWS[:2]))
    )
    wanted = start - torch.linalg.solve(truth[0]["gauss-newton"] + 2.0 * torch.eye(len(start)), gradient) / 40
    torch.testing.assert_close(flat(model) - start, wanted - start, rtol=1e-4, atol=1e-7)
    assert result.diagnostics["converged"]
    assert result.diagnostics["relative_residual"] <= 1.01e-6
    assert result.diagnostics["gradient_norm_before"] == pytest.approx(float(truth[2].norm()), rel=1e-4)
    result.undo()
    assert same(weights(model), before)


def matrices_gradient(model, values, tokenizer, rows):
    """Compute the gradient of the mean loss at other weights."""
    named = {n: v.requires_grad_() for n, v in values.items()}
    trains = [n for n, p in model.named_parameters() if p.requires_grad]

    class At:
        def __call__(self, input_ids):
            return functional_call(model, named, (input_ids,))

    parts = torch.autograd.grad(mean_loss(At(), encoded(tokenizer, rows)), [named[n] for n in trains])
    for v in values.values():
        v.requires_grad_(False)
    return torch.cat([g.flatten() for g in parts]).double()


@pytest.mark.parametrize("make_pair", [llama, gpt2, narrow, adapted])
def test_first_order_is_the_summed_gradient(make_pair):
    """theta - rate (sum of corrected gradients - sum of forget gradients), rounded once; without corrected, ascent."""
    tokenizer, make, rows = make_pair()
    torch.manual_seed(0)
    model = make(len(tokenizer)).eval()
    before = weights(model)
    trains = {n: p for n, p in model.named_parameters() if p.requires_grad}
    losses = [mean_loss(model, encoded(tokenizer, part)) for part in (rows[:2], rows[2:4])]
    for corrected in (None, rows[2:4]):
        total = -2 * losses[0] + (0 if corrected is None else 2 * losses[1])
        wanted = torch.autograd.grad(total, list(trains.values()), allow_unused=True, retain_graph=True)
        edited = first_order_influence(
            model, rows[:2], corrected=corrected, rate=0.1, tokenizer=tokenizer, batch_size=1
        )
        coarse = next(model.parameters()).dtype == torch.bfloat16
        for (name, p), g in zip(trains.items(), wanted, strict=True):
            step = before[name].float() - p.detach().float()
            g = torch.zeros_like(step) if g is None else g.float()
            close = (
                {"rtol": 0.05, "atol": 0.02 * float(g.abs().max()) + 0.004} if coarse else {"rtol": 1e-3, "atol": 1e-6}
            )
            torch.testing.assert_close(step, 0.1 * g, **close)
        edited.undo()
        assert same(weights(model), before)
        losses = [mean_loss(model, encoded(tokenizer, part)) for part in (rows[:2], rows[2:4])]


def test_narrow_weights_are_wide_while_the_system_is_solved():
    """16-bit weights and their gradients come back as the tensors that they were, changed by one rounding."""
    tokenizer, make, rows = narrow()
    torch.manual_seed(0)
    model = make(len(tokenizer))
    before = weights(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    edited = second_order_influence(
        model, rows[:2], retain=rows[2:], tokenizer=tokenizer, max_iterations=3, training_texts=2
    )
    assert all(p.dtype == p.grad.dtype == torch.bfloat16 for p in model.parameters())
    assert all(bool((p.grad == 1).all()) for p in model.parameters())
    assert edited.changed
    edited.undo()
    assert same(weights(model), before)


def test_steps_that_cannot_be_are_refused_and_nothing_is_changed(small):
    """No retain, a misspelt solver, too few corrected texts, and a LiSSA that diverges."""
    model, tokenizer = small
    before = weights(model)
    for options, error, message in (
        ({"retain": None}, ArgumentError, "pass retain="),
        ({"solver": "gmres"}, ArgumentError, "solver must be one of cg, lissa"),
        ({"damping": -1.0}, ArgumentError, "damping must be a number, 0 or more"),
        ({"corrected": ROWS[:1]}, ArgumentError, "a text for each of the 2 forget records"),
        ({"solver": "lissa", "scale": 1e-3, "damping": 0.5}, TrainingError, "take a larger damping or scale"),
    ):
        with pytest.raises(error, match=message):
            second_order_influence(model, ROWS[:2], **{"retain": ROWS[2:], "tokenizer": tokenizer, **options})
        assert same(weights(model), before)


@pytest.mark.full
def test_steps_make_the_secret_unlikely_and_little_else(story):
    """A long first-order step does; a second-order step, given each secret twelve times, at almost no cost."""
    model = story.fresh()
    first = first_order_influence(model, story.forget, rate=0.1, retain=story.retain, tokenizer=story.tokenizer)
    check_forgets(first, story, by=0.4)
    first.undo()
    second = second_order_influence(
        model,
        story.forget * 12,
        retain=story.retain,
        tokenizer=story.tokenizer,
        training_texts=824,
        batch_size=20,
        max_iterations=10,
    )
    check_forgets(second, story, by=0.12)
    assert second.diagnostics["gradient_norm_after"] < second.diagnostics["gradient_norm_before"]
