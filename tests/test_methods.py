"""Each method against its formula, and the methods by name."""

import functools
import json
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyunlearn import methods
from pyunlearn.errors import ArgumentError
from pyunlearn.methods import ALIASES, METHODS, OF_THE_LOOP, SYNONYMS, ga, npo, resolve, simnpo

finite_floats = functools.partial(st.floats, allow_nan=False, allow_infinity=False)
rows = st.lists(
    st.tuples(finite_floats(-90, -0.1), finite_floats(-90, -0.1), st.integers(1, 40)),
    min_size=1,
    max_size=6,
)


def tensors(batch):
    """forget (with a gradient), reference, lengths."""
    forget, reference, lengths = zip(*batch, strict=True)
    return (
        torch.tensor(forget, dtype=torch.float64, requires_grad=True),
        torch.tensor(reference, dtype=torch.float64),
        torch.tensor(lengths),
    )


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def softplus(x):
    """-log sigmoid(-x), without overflow."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def gradient(loss, x):
    return torch.autograd.grad(loss, x)[0].tolist()


def loss_of(method, forget, lengths, reference):
    """(B,) losses of a method on summed log-likelihoods."""
    return method.loss({"forget": forget, "lengths": lengths, "reference": reference}, {})


@given(rows)
def test_ga_is_the_log_likelihood_per_token(batch):
    """loss_i = L_i / T_i, and so the mean's gradient is 1 / (B T_i): minus that of descent on the likelihood."""
    forget, _, lengths = tensors(batch)
    loss = ga(forget, lengths)
    assert loss.item() == pytest.approx(sum(x / n for x, _, n in batch) / len(batch), rel=1e-12)
    assert gradient(loss, forget) == pytest.approx([1 / n / len(batch) for _, _, n in batch], rel=1e-12)


@given(rows, st.floats(0.01, 2.0))
def test_npo_is_its_formula(batch, beta):
    """Mean loss = -2/beta mean log sigmoid(-beta (L - L_ref)); gradient 2 sigmoid(beta (L - L_ref)) / B."""
    forget, reference, _ = tensors(batch)
    loss = npo(forget, reference, beta=beta)
    assert loss.item() == pytest.approx(
        2 / beta * sum(softplus(beta * (x - r)) for x, r, _ in batch) / len(batch), rel=1e-9
    )
    expected = [2 * sigmoid(beta * (x - r)) / len(batch) for x, r, _ in batch]
    assert gradient(loss, forget) == pytest.approx(expected, rel=1e-9, abs=1e-15)


@given(rows, st.floats(0.1, 5.0), st.floats(-1.0, 2.0))
def test_simnpo_is_its_formula(batch, beta, delta):
    """Mean loss = -2/beta mean log sigmoid(-beta (L / T + delta)); gradient 2 sigmoid(beta (L / T + delta)) / (B T)."""
    forget, _, lengths = tensors(batch)
    loss = simnpo(forget, lengths, beta=beta, delta=delta)
    assert loss.item() == pytest.approx(
        2 / beta * sum(softplus(beta * (x / n + delta)) for x, _, n in batch) / len(batch), rel=1e-9, abs=1e-15
    )
    expected = [2 * sigmoid(beta * (x / n + delta)) / n / len(batch) for x, _, n in batch]
    assert gradient(loss, forget) == pytest.approx(expected, rel=1e-9, abs=1e-15)


@given(rows)
def test_npo_with_a_vanishing_beta_is_gradient_ascent_on_the_sum(batch):
    """Its gradient tends to 1 / B, and its value to mean(L - L_ref) plus the constant 2 ln 2 / beta."""
    forget, reference, _ = tensors(batch)
    beta = 1e-6
    loss = npo(forget, reference, beta=beta)
    assert gradient(loss, forget) == pytest.approx([1 / len(batch)] * len(batch), rel=1e-4)
    wanted = sum(x - r for x, r, _ in batch) / len(batch)
    assert npo(forget, reference, beta=beta).item() - 2 * math.log(2) / beta == pytest.approx(wanted, abs=0.02)


def test_npo_at_its_reference_has_half_of_its_largest_gradient():
    """The gradient there is 2 sigmoid(0) / B = 1 / B; far above it is twice that, far below 0."""
    reference = torch.tensor([-10.0, -20.0, -1000.0, -1.0], dtype=torch.float64)
    forget = torch.tensor([-10.0, -20.0, -1.0, -1000.0], dtype=torch.float64, requires_grad=True)
    assert gradient(npo(forget, reference, beta=0.1), forget) == pytest.approx([0.25, 0.25, 0.5, 0.0], abs=1e-12)


def test_simnpo_stops_below_its_margin():
    """At -delta nats a token the gradient is half of the largest; far below it is 0."""
    forget = torch.tensor([-15.0, -400.0], dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([10, 10])
    assert gradient(simnpo(forget, lengths, delta=1.5), forget) == pytest.approx([0.05, 0.0], abs=1e-12)


@given(rows, st.sampled_from(["ga", "npo", "simnpo", "kto", "hinge"]))
def test_no_method_minds_the_order_and_each_makes_text_less_likely(batch, name):
    """Each example by itself, with a gradient that is never negative: to minimise is to ascend."""
    forget, reference, lengths = tensors(batch)
    method = METHODS[name]
    losses = loss_of(method, forget, lengths, reference)
    assert losses.shape == forget.shape
    assert all(g >= 0 for g in gradient(losses.sum(), forget))
    for i in range(len(batch)):
        assert loss_of(method, *(x[i : i + 1] for x in (forget, lengths, reference))).item() == pytest.approx(
            losses[i].item(), rel=1e-12
        )


def test_no_method_overflows():
    """Not in float32, not for a text of hundreds of tokens, not for a likelihood far from its reference."""
    for far in (-1e4, 1e4):
        forget = torch.tensor([-2e4 + far], requires_grad=True)
        for method in (METHODS[n] for n in ("ga", "npo", "simnpo", "kto", "hinge")):
            loss = loss_of(method, forget, torch.tensor([500]), torch.tensor([-2e4]))
            assert torch.isfinite(loss)
            assert math.isfinite(gradient(loss, forget)[0])


# ---------------------------------------------------------------- by name


def test_every_name_resolves_to_its_term_and_retain_loss():
    """Compound names are aliases; with a retain set 'auto' is the method's own retain loss, or else hold."""
    for name, method in METHODS.items():
        assert method.name == name
        if "retain" not in method.needs:
            assert resolve(name, "auto", False, {}, True) == (method, None)
            assert resolve(name.upper(), None, True, {}, True) == (method, None)
        own = {"kl": "nll", "pdu": "nll", "rmu": "representation", "adaptive_rmu": "representation"}.get(name, "hold")
        assert resolve(name, "auto", True, {}) == (method, own)
        for retain_loss in ("nll", "kl"):
            assert resolve(name, retain_loss, True, {}, True) == (method, retain_loss)
    for alias, (name, retain) in ALIASES.items():
        for given_retain in ("auto", retain, None):
            assert resolve(alias, given_retain, True, {}, True) == (METHODS[name], retain)
    for other, name in SYNONYMS.items():
        assert resolve(other, "auto", True, {}) == (METHODS[name], "hold")
        assert resolve(f"{other}+kl", "auto", True, {}) == (METHODS[name], "kl")
    assert resolve("ga+nll", "hold", True, {}) == (METHODS["ga"], "hold")
    assert resolve("npo", "auto", False, {"beta": 0.5}) == (METHODS["npo"], None)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("npoo", "npo"), ("grad_diff", "graddiff"), ("SimPO", "simnpo"), ("npo-nll", "npo+nll"), ("gaa", "ga")],
)
def test_a_typo_gets_the_nearest_name(name, nearest):
    """One sentence that ends with it."""
    with pytest.raises(
        ArgumentError, match=f'there is no method .*; did you mean "{nearest.replace("+", "[+]")}"'
    ) as error:
        resolve(name, "auto", True, {})
    assert repr(name) in str(error.value)


@pytest.mark.parametrize(
    ("name", "retain_loss", "has_retain", "options", "message"),
    [
        (
            "xyzzy",
            "auto",
            True,
            {},
            "choose from adaptive_rmu, .*, altpo, altpo[+]kl, .*, ce-u, .*, dpo, .*, flat, .*, graddiff, hinge",
        ),
        ("ga", "mse", True, {}, "retain_loss must be .* got 'mse'"),
        ("ga", "nll", False, {}, "method 'ga' with retain_loss='nll' needs text to keep: pass retain="),
        ("graddiff", "auto", False, {}, "method 'graddiff' .* or 'ga' with no retain loss"),
        ("npo+kl", "auto", False, {}, "method 'npo[+]kl' with retain_loss='kl' needs text to keep"),
        (
            "npo+kl",
            "nll",
            True,
            {},
            "'npo[+]kl' trains with retain_loss='kl', and retain_loss='nll' was given: choose one",
        ),
        ("ga+kl", "hold", True, {}, "'ga[+]kl' trains with retain_loss='kl', and retain_loss='hold' was given"),
        ("pdu", "auto", False, {}, "method 'pdu' bounds the loss of a retain set while it forgets: pass retain="),
        ("pdu", "hold", True, {}, 'method \'pdu\' bounds the loss .* retain_loss "nll" or "kl"'),
        ("kl", "auto", False, {}, "'kl' compares the model with itself here, .*: pass reference_model="),
        ("kl", "kl", True, {}, "'kl' compares the model with itself here"),
        ("kl", "auto", True, {"direction": "toward"}, "'kl' compares the model with itself here"),
        ("ga", "auto", True, {"beta": 1.0}, "method 'ga' has no option 'beta'; it has temperature, top_fraction"),
        ("npo", "auto", True, {"gamma": 1.0}, "method 'npo' has no option 'gamma'; it has beta"),
        (
            "simnpo+nll",
            "auto",
            True,
            {"gamma": 1.0},
            "method 'simnpo' has no option 'gamma'; it has beta, delta, temperature, top_fraction",
        ),
    ],
)
def test_names_and_options_that_exclude_each_other_are_refused(name, retain_loss, has_retain, options, message):
    """One sentence names it, and what would fit."""
    with pytest.raises(ArgumentError, match=message) as error:
        resolve(name, retain_loss, has_retain, options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "option"),
    [(name, o) for name, m in METHODS.items() for o, default in m.options.items() if isinstance(default, float)]
    + [("hinge", "delta")],
)
def test_an_option_that_is_a_number_is_checked_before_anything_happens(name, option):
    """No word, list, NaN or true, no sign that turns forgetting into learning, no 0 to divide by."""
    signed = option == "retain_tolerance" or (name, option) == ("simnpo", "delta")
    divides = option in ("temperature", "width") or (option == "beta" and METHODS[name].kind == "example")
    refused = (
        ["hot", [1], math.nan, math.inf, True] + [-1] * (not signed) + [0] * divides + [2] * (option == "top_fraction")
    )
    for value in refused:
        with pytest.raises(
            ArgumentError, match=rf"^{option} must be a number.*, got {re.escape(repr(value))}: leave it out"
        ):
            resolve(name, "auto", True, {option: value}, True)
    for value in (
        [1, 0.5]
        + [-1] * signed
        + [0] * (not divides and option != "top_fraction")
        + [None] * (name == "hinge" and option == "delta")
    ):
        resolve(name, "auto", True, {option: value}, True)


@pytest.mark.parametrize(
    ("name", "option", "refused", "message"),
    [
        ("flat", "divergence", ["KL", "hellinger", 1], "divergence must be one of kl, tv, pearson, js, got"),
        ("kl", "direction", ["up", None, -1], "direction must be one of away, toward, got"),
        ("ceu", "skip", [-1, 1.5, True, "1"], "skip must be a whole number, 0 or more, got"),
    ],
)
@pytest.mark.parametrize("has_reference", [True, False])
def test_an_option_of_another_kind_is_checked_before_anything_happens(name, option, refused, message, has_reference):
    """A name that is no choice, a number that is no count: before a text is scored or a checkpoint written."""
    for value in refused:
        with pytest.raises(ArgumentError, match=message):
            resolve(name, "auto", True, {option: value}, has_reference)


def test_every_method_names_its_source_and_its_options():
    """The options in the table are the keyword arguments of the function, and the docstring cites the paper."""
    added = {"reduction", "weights", *OF_THE_LOOP}
    for name in METHODS:
        function = getattr(methods, {"idkdpo": "dpo", "altpo": "dpo"}.get(name, name))
        assert METHODS[name].options.keys() - added == function.__kwdefaults__.keys() - added
        assert METHODS[name].source.removeprefix("arXiv ") in function.__doc__


def test_the_document_and_the_command_list_every_method_as_it_is(call):
    """docs/methods.md has a row and a formula for each; `pyunlearn methods` prints the same."""
    text = (Path(__file__).parent.parent / "docs" / "methods.md").read_text(encoding="utf-8")
    rows = {
        name: [cell.strip() for cell in cells.split("|")]
        for name, cells in re.findall(r"^\| `(\w+)` \|(.*)\|$", text.split("## Formulas")[0], re.M)
    }
    assert rows.keys() == METHODS.keys()
    listed = {m["name"]: m for m in json.loads(call("methods", "--json")[1])["methods"]}
    assert listed.keys() == METHODS.keys()
    for name, (needs, passes, source, sentence) in rows.items():
        method = METHODS[name]
        assert set(filter(None, needs.split(", "))) == set(method.needs) == set(listed[name]["needs"])
        assert int(passes) == method.passes == listed[name]["passes"]
        assert source == method.source == listed[name]["source"]
        assert sentence.endswith(".")
        assert listed[name]["options"] == method.options
        assert re.search(rf"^- .*`{name}`.*: ", text, re.M), f"no formula of {name}"
    assert all(f"`{alias}`" in text for alias in ALIASES if "+" not in alias)
