"""The two terms of the loss with a table of log-likelihoods in place of a model: which tensors, texts and weights."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

from pyunlearn.data import Tokens, collate
from pyunlearn.methods import METHODS, Multiplier
from pyunlearn.models.distributions import Distributions
from pyunlearn.unlearning.loss_tensors import example_tensors, token_tensors
from pyunlearn.unlearning.objectives import ForgetTerm, RetainTerm, Unseen, finite, multiplier_of
from pyunlearn.unlearning.reference import Reference

FORGET = [Tokens((0, 1, 2), 1), Tokens((0, 3, 4, 5), 1)]  # scored: (1, 2) and (3, 4, 5)
OTHER = [Tokens((0, 6), 1), Tokens((0, 7, 8), 1)]
RETAIN = [Tokens((0, 1), 1), Tokens((0, 2, 3, 4), 1), Tokens((0, 5, 6), 1)]
NLL = [float(i) for i in range(1, 11)]  # of token i: i + 1 nats


class TableLikelihood:
    """Log-likelihoods that depend on the token alone: -(id + 1) nats; every call is recorded."""

    def __init__(self):
        self.table = -torch.tensor(NLL, requires_grad=True)
        self.table.retain_grad()
        self.targets, self.options = [], []

    def objective(self, batch, function, *per_example, group_size=1, weights=None, **options):
        values = self.table[batch.targets] * (1.0 if weights is None else weights)
        sums = torch.zeros(len(batch.counts)).index_add(0, batch.example, values)
        shape = (-1, group_size) if group_size > 1 else (-1,)
        losses = function(*(x.view(shape) for x in (sums, batch.counts, *per_example)))
        return self._recorded(batch, losses, sums, options | {"weights": weights})

    def token_objective(self, batch, function, *per_token, group_size=1, **options):
        values = self.table[batch.targets]
        return self._recorded(batch, function(values, batch.example, batch.counts, *per_token), values, options)

    def distributions(self, batch):
        self.targets.append(batch.targets.tolist())
        return Distributions(self.table.expand(len(batch.targets), -1), None)

    def _recorded(self, batch, losses, values, options):
        self.targets.append(batch.targets.tolist())
        self.options.append(options)
        return SimpleNamespace(loss=losses.sum(), log_likelihood=values.detach())


def language_model():
    """Return a stand-in for a LanguageModel with the parts that the terms use."""

    def collate_some(tokens, indices=None):
        return collate(tokens if indices is None else [tokens[i] for i in indices], pad_id=9)

    return SimpleNamespace(device=torch.device("cpu"), likelihood=TableLikelihood(), collate=collate_some)


def reference_of(**log_likelihood):
    reference = Reference()
    reference.log_likelihood = {role: [np.array(x) for x in each] for role, each in log_likelihood.items()}
    return reference


def forget_term(
    name, loss=None, *, options=None, reference=None, weights=None, visits=(0, 0), batch_reduction="example", **texts
):
    """Return a method's forget term, perhaps with another loss of the same parameters."""
    method = METHODS[name] if loss is None else tiny.with_loss(name, loss)
    texts = {"forget": FORGET, **texts}
    weights = None if weights is None else [np.array(w) for w in weights]
    reference = reference or Reference()
    visits = np.array(visits)
    return ForgetTerm(
        language_model(), method, options or {}, texts, reference=reference, weights=weights, visits=visits,
        batch_reduction=batch_reduction,
    )  # fmt: skip


def recorder():
    """Return (a loss that stores its keywords, the stored keywords)."""
    stored = {}

    def loss(**tensors):
        stored.update(tensors)
        return torch.zeros(1)

    return loss, stored


# ---------------------------------------------------------------- names of tensors


def test_tensors_are_named_by_the_texts_that_a_method_reads():
    """A single text has the name of its role; the texts of a pair are the winner and, the forget text, the loser."""
    sums, lengths, reference = torch.tensor([-3.0, -4.0]), torch.tensor([2, 3]), torch.tensor([-5.0, -6.0])
    for name, role in (("ga", "forget"), ("npo", "forget"), ("idk", "refusal")):
        tensors = example_tensors(METHODS[name], sums, lengths, reference)
        assert tensors.keys() == {role, "lengths", "reference"}
        assert tensors[role] is sums
    pairs = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]])
    tensors = example_tensors(METHODS["dpo"], pairs, torch.ones(2, 2), 10 * pairs)
    assert {name: x.tolist() for name, x in tensors.items()} == {
        "winner": [-1.0, -3.0],
        "loser": [-2.0, -4.0],
        "winner_reference": [-10.0, -30.0],
        "loser_reference": [-20.0, -40.0],
    }


def test_token_probabilities_of_a_pair_are_computed_where_a_loss_reads_them():
    """They are means over each text's tokens, with the token weights as factors."""
    p = torch.tensor([0.5, 0.25, 0.75, 0.1])
    example, counts = torch.tensor([0, 1, 1, 1]), torch.tensor([1, 3])
    tensors = token_tensors(p.log(), example, counts, torch.zeros(4))
    assert set(tensors) == {"log_likelihood", "example", "counts", "reference"}
    assert tensors["winner_probability"].tolist() == pytest.approx([0.5])
    assert tensors["loser_probability"].tolist() == pytest.approx([1.1 / 3])
    weights = torch.tensor([1.0, 2.0, 0.0, 0.0])
    weighted = token_tensors(p.log(), example, counts, torch.zeros(4), weights=weights)
    assert weighted["weights"] is weights
    assert weighted["loser_probability"].tolist() == pytest.approx([0.5 / 3])


# ---------------------------------------------------------------- the forget term


def test_the_forget_term_is_the_sum_of_the_losses_of_its_examples():
    """Gradient ascent: the mean log-likelihood a token of each; the gradient reaches the table."""
    term = forget_term("ga")
    loss = term([1, 0])
    assert term.lm.likelihood.targets == [[3, 4, 5, 1, 2]]
    assert loss.item() == pytest.approx(-(4 + 5 + 6) / 3 - (2 + 3) / 2)
    loss.backward()
    wanted = [0, 1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3, 0, 0, 0, 0]
    assert term.lm.likelihood.table.grad.tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("name", [m.name for m in METHODS.values() if m.token_mean])
def test_batch_reduction_token_weighs_each_text_by_its_tokens(name):
    """So that the sum over the divisor, the number of scored tokens, is the mean over all of them.

    For what a method scores, and for texts that are brought back, of which the forget text is scored.
    """

    def term(batch_reduction):
        needed = {"forget": [[-1.0, -2.0], [-3.0] * 3]} if "reference" in METHODS[name].needs else {}
        reference = reference_of(**needed)
        if METHODS[name].kind == "vocabulary":
            rows = {(0, 1): 5, (0,): 2, (1,): 3}
            reference.forget = SimpleNamespace(at=lambda i: Distributions(torch.eye(10)[: rows[tuple(i)]] / 3, None))
        made = forget_term(name, refusal=OTHER, reference=reference, batch_reduction=batch_reduction)
        made.unseen = Unseen(np.full(2, -3.0), np.ones(2), np.full(4, -9.0))
        return made

    by_token, by_example = term("token"), term("example")
    lengths = (1, 2) if METHODS[name].roles == ("refusal",) else (2, 3)
    if METHODS[name].kind != "vocabulary":  # whose tables differ with the batch here
        assert by_token([0, 1]).item() == pytest.approx(sum(n * by_example([i]).item() for i, n in enumerate(lengths)))
    for i, length in enumerate(lengths):
        assert by_token([i]).item() == pytest.approx(length * by_example([i]).item())
    expected = 2 * by_example.restore([0]).item() + 3 * by_example.restore([1]).item()
    assert by_token.restore([0, 1]).item() == pytest.approx(expected)
    first, second = np.array([0]), np.array([1])
    assert by_token.divisor(np.arange(2)) == sum(lengths)
    assert (by_token.divisor(first, second), by_example.divisor(first, second)) == (lengths[0] + 3, 2)


def test_an_example_method_gets_reference_sums_and_its_own_options():
    """The reference's numbers are those of the examples taken, in their order; the loop's options go to the op."""
    loss, stored = recorder()
    options = {"beta": 0.3, "temperature": 2.0, "top_fraction": 0.5}
    term = forget_term("npo", loss, reference=reference_of(forget=[[-7.0], [-8.0]]), options=options)
    term([1, 0])
    assert stored["reference"].tolist() == [-8.0, -7.0]
    assert stored["forget"].tolist() == [-15.0, -5.0]
    assert stored["beta"] == 0.3
    assert stored["reduction"] == "none"
    assert stored.keys() == {"forget", "reference", "beta", "reduction"}
    assert term.lm.likelihood.options == [{"temperature": 2.0, "top_fraction": 0.5, "weights": None}]


def test_a_method_without_a_reference_gets_zeros():
    """One for each text, or for each token of a method on tokens."""
    for name, size in (("ga", 2), ("wga", 5)):
        seen = []
        term = forget_term(name)
        objective = "token_objective" if METHODS[name].token else "objective"
        original = getattr(term.lm.likelihood, objective)

        def watch(batch, function, reference, original=original, seen=seen, **options):
            seen.append(reference.tolist())
            return original(batch, function, reference, **options)

        setattr(term.lm.likelihood, objective, watch)
        term([0, 1])
        assert seen == [[0.0] * size]


def test_a_pair_is_read_next_to_each_other():
    """Its other text before the forget text, example by example; each with its own reference."""
    loss, stored = recorder()
    reference = reference_of(winner=[[-1.0], [-2.0]], forget=[[-3.0], [-4.0]])
    term = forget_term("dpo", loss, reference=reference, winner=OTHER)
    term([1, 0])
    assert term.lm.likelihood.targets == [[7, 8, 3, 4, 5, 6, 1, 2]]
    assert stored["winner"].tolist() == [-17.0, -7.0]
    assert stored["loser"].tolist() == [-15.0, -5.0]
    assert stored["winner_reference"].tolist() == [-2.0, -1.0]
    assert stored["loser_reference"].tolist() == [-4.0, -3.0]


def test_the_alternates_of_an_example_take_turns():
    """Each example's own number of accepted steps decides, and starts again after the last alternate."""
    alternates = [Tokens((0, i), 1) for i in (1, 2, 3, 6, 7, 8)]  # three for each of the two examples
    reference = reference_of(alternate=[[float(-i)] for i in range(6)], forget=[[0.0], [0.0]])
    loss, stored = recorder()
    term = forget_term("altpo", loss, reference=reference, alternate=alternates)
    for visits, firsts, indices in (((0, 0), (1, 6), (0, 3)), ((1, 0), (2, 6), (1, 3)), ((3, 5), (1, 8), (0, 5))):
        term.visits[:] = visits
        term([0, 1])
        (read,) = term.lm.likelihood.targets
        assert (read[0], read[3]) == firsts
        assert stored["winner_reference"].tolist() == [-i for i in indices]
        term.lm.likelihood.targets.clear()


def test_weights_are_those_of_the_forget_text_and_one_elsewhere():
    """In a pair the other text's tokens have weight 1; without token weights there are none."""
    weights = [[0.5, 1.5], [2.0, 0.0, 1.0]]
    reference = reference_of(winner=[[0.0], [0.0]], forget=[[0.0], [0.0]])
    pair = forget_term("dpo", reference=reference, winner=OTHER, weights=weights)
    pair([1, 0])
    assert pair.lm.likelihood.options[0]["weights"].tolist() == [1.0, 1.0, 2.0, 0.0, 1.0, 1.0, 0.5, 1.5]
    alone = forget_term("ga", weights=weights)
    assert alone([0]).item() == pytest.approx(-(0.5 * 2 + 1.5 * 3) / 2)
    assert forget_term("ga")._weights([("forget", 0)], FORGET[:1]) is None


def test_a_token_method_gets_weights_and_reference_values_of_single_tokens():
    """Both in the order of the scored tokens; the pair of flat has weights of 1 for the refusal."""
    loss, stored = recorder()
    reference = reference_of(forget=[[-0.1, -0.2], [-0.3, -0.4, -0.5]])
    term = forget_term("tnpo", loss, reference=reference, weights=[[0.5, 1.5], [2.0, 0.0, 1.0]])
    term([1, 0])
    assert stored["log_likelihood"].tolist() == [-4.0, -5.0, -6.0, -2.0, -3.0]
    assert stored["reference"].tolist() == pytest.approx([-0.3, -0.4, -0.5, -0.1, -0.2])
    assert stored["weights"].tolist() == [2.0, 0.0, 1.0, 0.5, 1.5]
    assert stored["counts"].tolist() == [3, 2]
    loss, stored = recorder()
    forget_term("flat", loss, refusal=OTHER, weights=[[2.0, 4.0], [0.0] * 3])([0])
    assert stored["winner_probability"].item() == pytest.approx(math.exp(-7))
    assert stored["loser_probability"].item() == pytest.approx((2 * math.exp(-2) + 4 * math.exp(-3)) / 2)


def test_a_method_on_distributions_gets_model_and_cached_reference():
    """The cache is read at the examples taken; without one the reference is None."""
    loss, stored = recorder()
    reference = Reference()
    reference.forget = SimpleNamespace(at=lambda indices: ("cache", indices))
    forget_term("undial", loss, reference=reference)([1])
    assert stored["reference"] == ("cache", [1])
    assert stored["targets"].tolist() == [3, 4, 5]
    assert stored["counts"].tolist() == [3]
    assert stored["model"].states.shape == (3, 10)
    forget_term("kl", loss)([0, 1])
    assert stored["reference"] is None


# ---------------------------------------------------------------- the retain term


def retain_term(loss="nll", weight=2.0, retain=RETAIN, **options):
    return RetainTerm(language_model(), loss, weight, retain, **{"reference": Reference(), **options})


def test_a_retain_term_is_active_with_text_and_weight():
    """Without a loss its weight is 0; a multiplier makes up for a constant weight."""
    assert retain_term().active
    assert not retain_term(retain=None).active
    assert not retain_term(weight=0.0).active
    assert retain_term(weight=0.0, multiplier=Multiplier(1.0, 1.0, 0.0, 0)).active


@pytest.mark.parametrize("loss", ["nll", "hold", "kl", "representation"])
def test_the_shares_of_micro_batches_add_up_to_the_step(loss):
    """Losses and reported sums, of texts of different lengths."""
    reference = Reference()
    rows = [len(t.scored) for t in RETAIN]

    def uniform(indices):
        return Distributions(torch.zeros(sum(rows[i] for i in indices), 10), None)

    reference.retain = SimpleNamespace(at=uniform)
    drift = torch.tensor([0.5, 0.25, 2.0])
    target = SimpleNamespace(alpha=3.0, retain_drift=lambda indices: drift[indices])
    term = retain_term(
        loss, initial_nll=np.array([1.0, 3.5, 9.0]) if loss == "hold" else None, reference=reference, target=target
    )
    step = term.batch([2, 0, 1])
    assert step == ([2, 0, 1], 6)
    whole, total = term([2, 0, 1], step)
    parts = [term(indices, step) for indices in ([2, 0], [1])]
    assert sum(x.item() for x, _ in parts) == pytest.approx(whole.item())
    assert sum(x for _, x in parts) == pytest.approx(total)
    divergence = (-torch.log_softmax(-torch.tensor(NLL), 0)).mean().item() - math.log(10)
    wanted = {
        "nll": (2.0 * 27 / 6, 27),  # NLLs 2, 3 + 4 + 5 and 6 + 7
        "hold": (2.0 / 3 * (1.0 + 0.5 + 0.0), 27),
        "kl": (2.0 * divergence, 6 * divergence),
        "representation": (2.0 * 3.0 / 3 * 2.75, 2.75),
    }[loss]
    assert (whole.item(), total) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "report"),
    [
        ("nll", {"retain_nll": 2.0}),
        ("hold", {"retain_nll": 2.0}),
        ("kl", {"retain_nll": None, "retain_kl": 2.0}),
        ("representation", {"retain_nll": None, "retain_drift": 6.0}),
    ],
)
def test_a_step_reports_means(loss, report):
    """A token, or an example of `representation`; None where there was no retain batch or the mean is not finite."""
    term = retain_term(loss)
    step = term.batch([1, 2])._replace(tokens=6)
    assert term.report(12.0, step) == report
    assert term.report(math.nan, step) == dict.fromkeys(report)
    assert term.report(0.0, None) == {"retain_nll": None}


def test_the_multiplier_of_a_step_is_reported_then_updated():
    """It is a factor on the weight; the report has the value that the step was taken with."""
    multiplier = Multiplier(5.0, step_size=2.0, bound=1.5, warmup=0)
    term = retain_term(weight=0.5, multiplier=multiplier)
    step = term.batch([1])
    assert term.weight == 2.5
    loss, total = term([1], step)
    assert loss.item() == pytest.approx(2.5 * 4)  # NLLs 3, 4, 5
    assert term.report(total, step) == {"retain_nll": 4.0, "multiplier": 5.0}
    assert (multiplier.value, multiplier.steps) == (10.0, 1)
    assert term.weight == 5.0
    assert term.report(math.inf, step) == {"retain_nll": None, "multiplier": 10.0}
    assert (multiplier.value, multiplier.steps) == (10.0, 2)


def test_the_bound_of_the_multiplier_is_above_the_first_retain_loss():
    """The room is the tolerance times the mean NLL a token, at least 1 nat; a divergence begins at 0."""
    settings = {"multiplier": 50.0, "multiplier_step_size": 1.0, "multiplier_warmup": 3, "retain_tolerance": 0.1}
    made = multiplier_of(settings, "nll", RETAIN, np.array([6.0, 2.0, 3.0]))  # 1, 3 and 2 tokens
    assert (made.value, made.step_size, made.warmup, made.steps) == (50.0, 1.0, 3, 0)
    assert made.bound == pytest.approx(3.0 * 1.1)
    assert multiplier_of(settings, "nll", RETAIN, np.full(3, 0.5)).bound == pytest.approx(0.5 + 0.1)
    assert multiplier_of(settings, "kl", RETAIN, np.full(3, 9.0)).bound == pytest.approx(0.1)


def test_finite_is_none_for_what_json_lacks():
    """NaN and both infinities; a number stays what it is."""
    assert [finite(x) for x in (math.nan, math.inf, -math.inf, 0.0, -2.5)] == [None, None, None, 0.0, -2.5]


@pytest.mark.parametrize("name", ["ga", "npo", "simnpo", "kto", "hinge", "altpo"])
def test_the_scale_makes_a_loss_on_sums_pull_as_gradient_ascent_does(name):
    """On average over the active examples; at the reference, and where the loss has faded; also where the options that
    change the sums are passed at their defaults."""
    method, lengths = METHODS[name], torch.tensor([2.0, 3.0], dtype=torch.float64)
    options = {key: method.options[key] for key in ("temperature", "top_fraction") if key in method.options}
    numbers = {role: [[-2.0], [-3.0]] for role in method.roles}  # -1 a token
    reference = reference_of(**numbers) if "reference" in method.needs else None
    term = forget_term(name, options=options, reference=reference, **({"alternate": FORGET} if method.pairs else {}))
    for mean in (-1.0, -2.5):
        per_token = torch.full((2,), mean, dtype=torch.float64, requires_grad=True)
        own, at_reference = per_token * lengths, -lengths
        if method.pairs:
            own, at_reference = (torch.stack([-lengths, x], dim=1) for x in (own, at_reference))
        losses = method.loss(example_tensors(method, own, lengths, at_reference), {})
        (slope,) = torch.autograd.grad(losses.sum(), per_token)
        scale = term.scale(np.full(2, mean), np.array([0, 1]))
        assert scale * slope.abs().mean().item() == pytest.approx(1.0)
    assert term.scale(np.full(2, -1.0), np.array([], dtype=np.int64)) == 1.0


@pytest.mark.parametrize("name", ["ceu", "undial", "kl", "pdu"])
def test_losses_on_distributions_leave_out_tokens_at_the_level_of_unseen_text(name):
    """Token i has -(i + 0.46) nats here, and the tokens of unseen text -2: of all five, token 1 alone is unlearned."""
    loss, stored = recorder()
    term = forget_term(name, loss)
    term([0, 1])
    assert "weights" not in stored
    term.unseen = Unseen(np.full(2, -2.0), np.ones(2), np.full(9, -2.0))
    term([0, 1])
    assert stored["weights"].tolist() == [1, 0, 0, 0, 0]
