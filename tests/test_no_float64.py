"""On a simulated device that refuses what Apple's MPS refuses, every command runs and gives the numbers of the CPU."""

import json

import no_float64
import numpy as np
import pytest
import torch
from coverings import in_full, slow

import pyunlearn
from pyunlearn import ops
from pyunlearn.data import encode, read_examples
from pyunlearn.edits.registry import EDITS
from pyunlearn.methods import METHODS
from pyunlearn.models import default_device
from pyunlearn.models.devices import seeded
from pyunlearn.ops import _backend
from pyunlearn.probes import gradient_norms, mean_gradient, representations, teacher_forced

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="torch knows one accelerator, and here it is CUDA"),
    pytest.mark.skipif(not no_float64.supported(), reason="this torch knows no device that is written in Python"),
]


@pytest.fixture
def device(monkeypatch):
    """The simulated device, and the PyTorch kernels on the CPU too, so that both compute alike."""
    plain = _backend.Choice("reference", "chosen by the test")
    monkeypatch.setattr(_backend, "on_cpu", lambda: plain)
    with no_float64.present(monkeypatch) as simulated:
        yield simulated


@pytest.mark.parametrize(
    "refused",
    [
        lambda x: x.double(),
        lambda x: x.to(torch.float64),
        lambda x: x.sum(dtype=torch.float64),
        lambda x: x.new_zeros(2, dtype=torch.float64),
        lambda x: torch.zeros(2, dtype=torch.float64, device=x.device),
        lambda x: torch.from_numpy(np.ones(2)).to(x.device),
        lambda x: torch.tensor(1.0, dtype=torch.float64, device=x.device),
    ],
)
def test_float64_on_the_device_raises_type_error(device, refused):
    """As it does on MPS; on the CPU it is there."""
    x = torch.ones(2).to(device)
    assert x.device == device
    assert x.cpu().double().device.type == "cpu"
    with pytest.raises(TypeError, match="MPS"):
        refused(x)


def test_other_refusals_of_the_device(device):
    """Operands on two devices, operators without a kernel, resized storages, early copies, arrays of its memory."""
    x = torch.ones(2).to(device)
    for refused in (
        lambda: x + torch.ones(2),
        lambda: x.untyped_storage().resize_(0),
        lambda: torch.ones(2).to(device, non_blocking=True),
        lambda: torch.segment_reduce(x, "sum", lengths=torch.tensor([2]).to(device)),
    ):
        with pytest.raises((RuntimeError, NotImplementedError)):
            refused()
    with pytest.raises((TypeError, RuntimeError)):
        x.numpy()
    assert (x + 1.0).tolist() == [2.0, 2.0]


def sums(log_likelihood, example, counts):
    """Sum the log-likelihoods of each example, for token_objective."""
    return torch.zeros(len(counts), device=counts.device).index_add(0, example, log_likelihood)


OPS = {
    "linear_log_likelihood": lambda h, w, t, e: ops.linear_log_likelihood(h, w, t, logit_scale=0.5),
    "kl_divergence": lambda h, w, t, e: ops.kl_divergence(h, w, h.detach() / 2, w.detach(), t, target_shift=1.0),
    "logit_margin": lambda h, w, t, e: ops.logit_margin(h, w),
    "a share of the tokens": lambda h, w, t, e: (
        ops.example_objective(h, w, t, e, lambda sums, counts: sums / counts, top_fraction=0.29).loss
    ),
    "example_objective": lambda h, w, t, e: ops.example_objective(h, w, t, e, lambda sums, counts: sums / counts).loss,
    "token_objective": lambda h, w, t, e: ops.token_objective(h, w, t, e, sums).loss,
    "weighted_log_likelihood": lambda h, w, t, e: ops.weighted_log_likelihood(h, w, t, h.detach()[:, 0]),
    "token_statistics": lambda h, w, t, e: ops.token_statistics(h, w, t, bias=w.detach()[:, 0], softcap=5.0),
}


@pytest.mark.parametrize("name", OPS)
def test_ops_have_the_numbers_of_the_cpu(device, name):
    """With ignored rows, examples of different lengths, ties of two words of the vocabulary, and gradients."""
    torch.manual_seed(0)
    hidden, weight, example = torch.randn(40, 16), torch.randn(50, 16), torch.arange(40) // 7
    targets = torch.randint(50, (40,))
    weight[7], targets[::5], targets[3::9] = weight[3], 3, -100

    def outputs(*tensors):
        h, w = (x.requires_grad_() for x in tensors[:2])
        out = OPS[name](h, w, *tensors[2:])
        out = [*out] if isinstance(out, tuple) else [out]
        assert all(x.device == h.device for x in out)
        if out[0].requires_grad:
            out[0].sum().backward()
            out += [h.grad, w.grad]
        return [x.detach().cpu() for x in out]

    inputs = (hidden, weight, targets, example)
    ours, expected = outputs(*(x.to(device) for x in inputs)), outputs(*(x.clone() for x in inputs))
    assert len(ours) > 1
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


def unlearned(data, method, **options):
    if method == "dpo":
        options["method_options"] = {"winners": ["a lamp.", "the sea."]}
    return pyunlearn.unlearn(
        data.fresh(), data.forget, retain=data.retain[:4], holdout=data.holdout[:20], tokenizer=data.tokenizer,
        method=method, max_steps=2, progress=False, **options,
    )  # fmt: skip


def numbers(result):
    names = ("forget_loss", "retain_nll", "gradient_norm")
    return np.array([[record[k] or 0.0 for k in names] for record in result.history])


LEAST = ["npo", "undial+kl", "rmu"]
OPTIONS = [
    {"method": "wga", "token_weights": "importance", "token_share": 0.5},
    {"method": "wga", "method_options": {"temperature": 0.7}, "micro_batch_size": 1, "l1": 1e-6},
    {"method": "ga", "method_options": {"top_fraction": 0.29}, "order": "easy_first", "difficulty": "ksd"},
    {"method": "simnpo", "order": "hard_first", "mask": "saliency"},
]


def on_the_cpu(monkeypatch):
    """Have accelerate and default_device choose the CPU from now on."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    no_float64.forget_the_choice()
    assert default_device().type == "cpu"


def same_run(monkeypatch, data, method, **options):
    """Run on the device and on the CPU, and compare the steps; the gradient of a KL from itself is mostly rounding."""
    result = unlearned(data, method, **options)
    assert result.model.device.type == default_device().type == no_float64.NAME
    on_the_cpu(monkeypatch)
    ours, expected = numbers(result), numbers(unlearned(data, method, **options))
    np.testing.assert_allclose(ours[0, :2], expected[0, :2], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours, expected, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("method", [*LEAST, *in_full(*sorted({*METHODS} - {*LEAST}))])
def test_unlearn(answers, device, monkeypatch, method):
    """Every method takes two steps on the device, and the same ones on the CPU."""
    same_run(monkeypatch, answers, method, **({"retain_loss": "nll"} if method == "match" else {}))


@pytest.mark.full
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_unlearn_with_options(answers, device, monkeypatch, options):
    """Token weights, shares, orders, masks and penalties have no float64 either."""
    same_run(monkeypatch, answers, **options)


@pytest.mark.full
def test_unlearn_with_the_utility_held(answers, device):
    """At first rounding decides which texts are above their bound, so the CPU's steps may be others."""
    result = unlearned(answers, "ga", retain_loss="hold")
    assert result.model.device == device
    assert np.isfinite(numbers(result)).all()


@pytest.mark.full
def test_unlearn_an_encoder_decoder(t5, device, monkeypatch):
    """T5, by NPO."""
    same_run(monkeypatch, t5, "npo")


@pytest.mark.parametrize("metrics", [["membership"], *in_full(["answer_prior", "continuations", "membership"])])
def test_audit_of_a_saved_model(answers, device, monkeypatch, tmp_path, metrics):
    """It is loaded onto the device, and every number is that of the CPU."""
    answers.model.save_pretrained(tmp_path)
    answers.tokenizer.save_pretrained(tmp_path)
    moved, move = [], torch.nn.Module.to

    def to(module, target, *rest):
        moved.append(torch.device(target).type)
        return move(module, target, *rest)

    monkeypatch.setattr(type(answers.model), "to", to)

    def audit():
        audit = pyunlearn.audit(
            tmp_path, answers.forget, holdout=answers.holdout[:20], metrics=metrics, budget=2, progress=False
        )
        return [e.exposure for e in audit.examples], audit.to_dict()["examples"]

    (exposures, examples), _ = audit(), on_the_cpu(monkeypatch)
    expected, theirs = audit()
    assert moved == [no_float64.NAME, "cpu"]
    np.testing.assert_allclose(exposures, expected, rtol=1e-4)
    assert [e["verdict"] for e in examples] == [e["verdict"] for e in theirs]


def test_compare(answers, device):
    """It moves the model to the device, measures there, and gives it back on the CPU."""
    before = {name: p.clone() for name, p in answers.model.named_parameters()}
    made = pyunlearn.compare(
        answers.model, answers.forget, retain=answers.retain[:8], holdout=answers.holdout[:20],
        tokenizer=answers.tokenizer, methods=["ga"], max_steps=2, progress=False,
    )  # fmt: skip
    assert [row.status for row in made.rows] == ["done"]
    assert all(torch.equal(p, before[name]) for name, p in answers.model.named_parameters())


QUICK, LONG = ["lunar", "fisher_step"], ["second_order_influence", "woodfisher_step"]


@pytest.mark.parametrize("name", [*QUICK, *in_full(*sorted({*EDITS} - {*QUICK, *LONG})), *slow(*LONG)])
def test_edits(answers, device, monkeypatch, name):
    """Every edit of the registry runs on the device, and its losses afterwards are those of the CPU."""

    def nudge(model, tokens):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.001)

    options = {"task_vector": {"fine_tuned": nudge}, "lunar": {"unanswerable": ["who is it?", "what for?"]}}.get(
        name, {}
    )

    def edited(model):
        return EDITS[name].function(
            model, answers.forget, retain=answers.retain[:6], tokenizer=answers.tokenizer, progress=False, **options
        )

    with monkeypatch.context() as patch:
        patch.setattr("pyunlearn.edits.base.Tensor", no_float64.OnDevice)  # a subclass, which edits refuse
        there = edited(answers.fresh().to(device))
    assert next(there.model.parameters()).device == device
    assert there.changed
    here = edited(answers.fresh())
    for role, nll in here.nll_after.items():
        assert there.nll_after[role] == pytest.approx(nll, rel=2e-2)  # eigenvectors in float32: 1.1 % on some CPUs
    there.undo()
    for p, original in zip(there.model.parameters(), answers.model.parameters(), strict=True):
        assert torch.equal(p.cpu(), original)


@pytest.mark.full
def test_the_edit_command_loads_onto_the_device(answers, device, monkeypatch, tmp_path, call):
    """Saving is left out, because transformers reads addresses of storages, which the simulation has not."""
    answers.model.save_pretrained(tmp_path / "model")
    answers.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "forget.jsonl").write_text("\n".join(map(json.dumps, answers.forget)))
    saved = []
    monkeypatch.setattr("pyunlearn.edits.base.Tensor", no_float64.OnDevice)
    monkeypatch.setattr("pyunlearn.output.save_folder", lambda target, model, *rest: saved.append(model.device.type))
    words = ("--forget", tmp_path / "forget.jsonl", "--edit", "first_order_influence", "--out", tmp_path / "edited")
    code, _, err = call("edit", tmp_path / "model", *words)
    assert (code, saved) == (0, [no_float64.NAME]), err


def test_probes(answers, device):
    """Norms of gradients, a mean gradient, representations, teacher-forced numbers and greedy continuations."""
    tokens = encode(read_examples(answers.forget, role="x"), answers.tokenizer, role="x", max_length=None)
    model = answers.fresh().to(device)
    for probe in (gradient_norms, lambda *a: np.stack(representations(*a))):
        np.testing.assert_allclose(probe(model, tokens), probe(answers.model, tokens), rtol=1e-3, atol=1e-5)
    ours, expected = (mean_gradient(m, tokens) for m in (model, answers.model))
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name].cpu(), gradient, rtol=1e-3, atol=1e-5)
    ours, expected = (teacher_forced(m, tokens) for m in (model, answers.model))
    np.testing.assert_allclose(ours.log_likelihood, expected.log_likelihood, rtol=1e-3, atol=1e-5)
    assert (ours.rank == expected.rank).all()


def test_seeded_restores_the_generators(device):
    """Those of the CPU and of the device."""
    torch.manual_seed(7)
    before = torch.get_rng_state()
    with seeded(3, torch.device("cpu")):
        first = torch.rand(2)
    torch.manual_seed(7)
    with seeded(3, device):
        assert torch.equal(torch.rand(2), first)
        assert no_float64.NOISE.item() == 3
    assert no_float64.NOISE.item() == 7
    assert torch.equal(torch.get_rng_state(), before)
