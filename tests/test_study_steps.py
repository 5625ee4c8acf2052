"""Training steps of fixed shapes: the plain step but for rounding; a capture leaves no trace, and may fail."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pyunlearn.data import Tokens
from pyunlearn.models.from_scratch import untrained_llama, untrained_t5
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.study import steps as study_steps
from pyunlearn.study import training
from pyunlearn.study.config import StudyConfig
from pyunlearn.study.folder import Folder
from pyunlearn.study.models import optimizer_of
from pyunlearn.study.steps import FixedSteps, PlainStep, captured, fixed_batch, set_rate, training_step, width_of

VOCABULARY, BATCH = 60, 5
SETUPS = ("translation", "text")


def examples(setup, count=40):
    """Return examples of 3 to 14 tokens; those of text are scored from their second token or later."""
    rng = np.random.default_rng(0)

    def ids(n):
        return tuple(rng.integers(3, VOCABULARY, 3 + n * 7 % 12).tolist())

    if setup == "translation":
        return [Tokens(ids(n), 0, ids(n + n % 3)) for n in range(count)]
    return [Tokens(ids(n), 1 + n % 2) for n in range(count)]


def model(setup, dropout=0.0, device="cpu"):
    """Return a small model in training mode and its optimizer, always the same."""
    torch.manual_seed(0)
    size = {"width": 32, "feed_forward": 64, "heads": 2, "layers": 2, "dropout": dropout}
    made = untrained_t5(VOCABULARY, **size) if setup == "translation" else untrained_llama(60, context=20, **size)
    lm = LanguageModel.described(made.to(device).train(), None)
    return lm, optimizer_of(lm, StudyConfig(setup=setup, weight_decay=0.1))


def batches(setup):
    """Return batches of several widths, the third smaller than the others."""
    tokens = sorted(examples(setup), key=lambda t: width_of([t], None))
    order = [tokens[at : at + BATCH] for at in range(0, len(tokens), BATCH)]
    return [order[3], order[0], order[6][:2], order[0], order[7], order[3], order[1]]


def run(lm, optimizer, step, setup):
    """Train on the batches; return the losses and the weights."""
    torch.manual_seed(1)
    losses = []
    for number, tokens in enumerate(batches(setup)):
        set_rate(optimizer, 1e-3 * (1 + number))
        losses.append(float(step(tokens)))
    return losses, [p.detach().cpu().clone() for p in lm.module.parameters()]


def trained(setup, kind, *rest, dropout=0.0, device="cpu"):
    lm, optimizer = model(setup, dropout, device)
    step = PlainStep(lm, optimizer) if kind is PlainStep else FixedSteps(lm, optimizer, BATCH, *rest)
    return run(lm, optimizer, step, setup)


def like_a_graph(clear, take):
    """Take steps as a capture does, and return a call that repeats them."""
    for _ in range(3):
        clear()
        take()

    def replay():
        clear()
        return take()

    return replay


def failing(clear, take):
    """Fail as a capture does, after the steps to warm up."""
    like_a_graph(clear, take)
    raise RuntimeError("operation not permitted when stream is capturing\nmore")


def assert_same_bits(first, second):
    assert first[0] == second[0]
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@pytest.mark.parametrize("setup", SETUPS)
def test_a_step_of_fixed_shape_is_the_plain_step(setup):
    """Losses and weights after seven steps of four widths, with a batch that is not full."""
    (plain, weights), (fixed, others) = trained(setup, PlainStep), trained(setup, FixedSteps)
    np.testing.assert_allclose(fixed, plain, rtol=2e-5)
    for a, b in zip(weights, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4)
    assert len({width_of(tokens, None) for tokens in batches(setup)}) > 3


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_capture_leaves_no_trace(setup, dropout):
    """Its steps change neither weights nor moments nor noise: the same bits as without one."""
    without = trained(setup, FixedSteps, dropout=dropout)
    assert_same_bits(trained(setup, FixedSteps, like_a_graph, dropout=dropout), without)


@pytest.mark.parametrize("setup", SETUPS)
def test_where_a_capture_fails_the_plain_step_takes_over(setup):
    """From the first batch on, to the same bits, with one warning and one attempt."""
    attempts = []

    def capture(clear, take):
        attempts.append(1)
        return failing(clear, take)

    with pytest.warns(UserWarning, match=r"graph \(operation not permitted .* capturing\): each step") as caught:
        made = trained(setup, FixedSteps, capture, dropout=0.3)
    assert len([w for w in caught if "CUDA graph" in str(w.message)]) == len(attempts) == 1
    assert_same_bits(made, trained(setup, PlainStep, dropout=0.3))


def test_a_capture_that_fails_later_frees_those_before_it():
    """No shape and no gradient is left, which would hold a graph's memory; the steps after it are the plain ones."""
    lm, optimizer = model("text")
    captures = iter([like_a_graph, failing])
    steps = FixedSteps(lm, optimizer, BATCH, lambda clear, take: next(captures)(clear, take))
    narrow, wide = batches("text")[1], batches("text")[4]
    steps(narrow)
    assert len(steps.shapes) == 1
    gradients = []

    class Recording(PlainStep):
        def __call__(self, tokens):
            gradients.extend(p.grad for p in lm.module.parameters())
            return super().__call__(tokens)

    steps.plain = Recording(lm, optimizer)
    with pytest.warns(UserWarning, match="could not be captured as a CUDA graph"):
        steps(wide)
    assert steps.failed
    assert not steps.shapes
    assert gradients
    assert all(x is None for x in gradients)


def test_the_graphs_of_a_training_share_their_memory(monkeypatch):
    """Each width is captured into the pool of its training; another training has another pool."""
    handles, pools = iter([(0, 1), (0, 2)]), []
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))

    def capture(clear, take, pool=None):
        pools.append(pool)
        return take

    monkeypatch.setattr(study_steps, "captured", capture)
    for _ in range(2):
        steps = training_step(SimpleNamespace(device=torch.device("cuda")), None, BATCH)
        steps.capture(None, None)
        steps.capture(None, None)
    assert pools == [(0, 1), (0, 1), (0, 2), (0, 2)]


def test_buffers_stay_where_they_are():
    """A graph reads a batch of a width from the same memory in every step, and a rate that is a tensor."""
    lm, optimizer = model("translation")
    steps = FixedSteps(lm, optimizer, BATCH)

    def addresses():
        return {width: [x.data_ptr() for x in fixed.tensors()] for width, (fixed, _) in steps.shapes.items()}

    for tokens in batches("translation"):
        steps(tokens)
    before = addresses()
    for tokens in reversed(batches("translation")):
        steps(tokens)
    assert addresses() == before
    assert len(before) > 3
    rate = torch.zeros(())
    on_gpu = torch.optim.AdamW([{"params": list(lm.module.parameters()), "scale": 4.0, "lr": rate}], lr=0.0)
    set_rate(on_gpu, 0.5)
    assert on_gpu.param_groups[0]["lr"] is rate
    assert float(rate) == 2.0


@pytest.mark.parametrize("setup", SETUPS)
def test_what_fills_a_batch_up_counts_for_nothing(setup):
    """Real tokens have equal weights, the rest none; every width has one shape, within the model's limit."""
    lm, _ = model(setup)
    tokens = examples(setup)[:3]
    batch, weights = fixed_batch(lm, tokens, BATCH, 16)
    count = sum(len(t.scored) for t in tokens)
    assert weights.tolist() == pytest.approx([1 / count] * count + [0.0] * (BATCH * 16 - count))
    assert batch.ids.shape == batch.attention_mask.shape == (BATCH, 16)
    assert batch.rows.shape == batch.targets.shape == (BATCH * 16,)
    assert batch.targets[:count].tolist() == [i for t in tokens for i in t.scored]
    assert batch.attention_mask.sum(1).tolist() == [len(t.ids) for t in [*tokens, tokens[0], tokens[0]]]
    assert width_of([Tokens(tuple(range(17)), 1)], 20) == 20


@pytest.mark.full
def test_a_training_with_captures_resumes_to_the_same_bits(tmp_path, monkeypatch):
    """Interrupted between two steps, where graphs are gone and are captured again; with dropout."""

    class Tokenizer:
        pad_token_id, eos_token_id = 0, 1

        def __len__(self):
            return VOCABULARY

        def save_pretrained(self, path):
            pass

    monkeypatch.setattr(training, "training_step", lambda *step: FixedSteps(*step, like_a_graph))
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    config = StudyConfig(batch_size=BATCH, warmup=2, dropout=0.2, vocabulary=VOCABULARY)
    tokens, real = examples("translation"), training._step

    def train(name):
        folder = Folder(tmp_path / name, {})
        training.train(folder, "m", config, Tokenizer(), tokens, [range(40)] * 2, seed=0, device="cpu")
        return (tmp_path / name / "models" / "m" / "model.safetensors").read_bytes()

    whole, calls = train("whole"), []

    def stop(*values):
        calls.append(1)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return real(*values)

    monkeypatch.setattr(training, "_step", stop)
    with pytest.raises(KeyboardInterrupt):
        train("again")
    monkeypatch.setattr(training, "_step", real)
    assert train("again") == whole


# ---------------------------------------------------------------- on a GPU


@pytest.mark.cuda
@pytest.mark.parametrize("setup", SETUPS)
def test_a_graph_trains_as_the_step_it_was_made_of(setup):
    """Replays follow new batches, widths and learning rates; a second run of graphs differs by rounding alone."""
    eager = trained(setup, FixedSteps, device="cuda")
    for _ in range(2):
        graphs = trained(setup, FixedSteps, captured, device="cuda")
        np.testing.assert_allclose(graphs[0], eager[0], rtol=2e-3)
        for a, b in zip(graphs[1], eager[1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=2e-3)


@pytest.mark.cuda
def test_a_graph_draws_new_dropout_in_every_replay():
    """At a learning rate of 0 the losses of a batch differ, and are the same again from the same random state."""
    lm, optimizer = model("translation", 0.3, "cuda")
    steps, tokens = FixedSteps(lm, optimizer, BATCH, captured), batches("translation")[0]

    def losses():
        torch.manual_seed(7)
        return [float(steps(tokens)) for _ in range(4)]

    first = losses()
    assert len(set(first)) == 4
    assert losses() == pytest.approx(first, rel=1e-4)
    assert not steps.failed


@pytest.mark.cuda
def test_a_capture_that_fails_leaves_a_usable_generator():
    """A step that reads a value cannot be captured; the plain step draws dropout after it."""
    lm, optimizer = model("translation", 0.3, "cuda")

    def reading(clear, take):
        return captured(clear, lambda: take() * float(take()))

    steps = FixedSteps(lm, optimizer, BATCH, reading)
    with pytest.warns(UserWarning, match="could not be captured as a CUDA graph"):
        steps(batches("translation")[0])
    assert np.isfinite([float(steps(tokens)) for tokens in batches("translation")]).all()
