"""The decision rule: rarely wrong without an effect, and decided with the effects that the study is planned for."""

import math

import numpy as np
import pytest
from scipy import stats

from pyunlearn.study.claims import CLAIMS
from pyunlearn.study.decisions import decide, holm, interval, seeds_needed

MARGINS = {name: e.margin for name, e in CLAIMS.items()}
STUDIES = 500
ERROR = math.sqrt(0.05 * 0.95 / STUDIES)
"""Standard error of a share near 5 %."""
DECIDED = ("supported", "contradicted")


def outcomes(draw):
    """Return an outcome for each study and claim; draw(claim, study) are the contrasts."""
    decisions = [decide({c: draw(c, s) for c in MARGINS}, MARGINS) for s in range(STUDIES)]
    return np.array([[d[c].outcome for c in MARGINS] for d in decisions])


# ---------------------------------------------------------------- without an effect


@pytest.mark.full
@pytest.mark.parametrize("seeds", [6, 12, 16])
@pytest.mark.parametrize("law", ["normal", "heavy tails", "unequal spreads", "correlated claims"])
def test_without_an_effect_hardly_any_claim_is_decided(law, seeds):
    """Of any claim at most 5 % of studies are wrong, of all five together too; spreads of 3 margins hide no effect."""
    rng = np.random.default_rng(seeds)
    common = rng.normal(size=(STUDIES, seeds))

    def draw(claim, study):
        x = rng.normal(size=seeds)
        if law == "heavy tails":
            x = rng.standard_t(3, seeds)
        elif law == "unequal spreads":
            x *= np.exp(rng.normal(0, 1, seeds))
        elif law == "correlated claims":
            x = 0.3 * x + common[study]
        return 3 * MARGINS[claim] * x

    wrong = np.isin(outcomes(draw), DECIDED)
    assert wrong.mean(0).max() <= 0.05
    assert wrong.any(1).mean() <= 0.05 + 2 * ERROR


@pytest.mark.full
@pytest.mark.parametrize("seeds", [6, 12, 16])
@pytest.mark.parametrize(("spread", "most"), [(0.5, 0.07), (1.0, 0.14)])
def test_skewed_contrasts_are_decided_as_often_as_the_document_says(spread, most, seeds):
    """Log-normal ones without an effect: Student's t is not exact then."""
    rng = np.random.default_rng(seeds)
    mean = math.exp(spread**2 / 2)
    made = outcomes(lambda c, _: 3 * MARGINS[c] * (np.exp(rng.normal(0, spread, seeds)) - mean) / mean)
    assert np.isin(made, DECIDED).mean(0).max() <= most


@pytest.mark.full
def test_an_effect_at_the_margin_is_hardly_called_immaterial():
    """Each claim in at most 5 % of studies, for an effect just as large as the margin."""
    rng = np.random.default_rng(0)
    alike = outcomes(lambda c, _: rng.normal(MARGINS[c], MARGINS[c] / 2, 12)) == "no material difference"
    assert alike.mean(0).max() <= 0.05 + 2.5 * ERROR


# ---------------------------------------------------------------- with the effects of the plan


PLANNED = {  # mean and standard deviation between seeds, and the outcome; of the first three measured before the design
    "steps": (1.70, 0.55, "supported"),
    "trade-off": (0.027, 0.0143, "supported"),
    "decay": (0.33, 0.12, "supported"),
    "memorization": (1.0, 0.67, "supported"),
    "difficulty": (0.0, 0.1, "no material difference"),
}


@pytest.mark.full
@pytest.mark.parametrize("seeds", [12, 16])
def test_the_effects_of_the_plan_are_decided(seeds):
    """Each claim in at least 80 % of studies, with the right outcome."""
    rng = np.random.default_rng(seeds)
    made = outcomes(lambda c, _: rng.normal(*PLANNED[c][:2], seeds))
    for number, (claim, (_, _, outcome)) in enumerate(PLANNED.items()):
        assert (made[:, number] == outcome).mean() >= 0.8, claim


@pytest.mark.parametrize(("effect", "seeds", "power"), [(1, 12, 0.64), (1, 16, 0.83), (1.5, 8, 0.74), (2, 8, 0.95)])
def test_the_power_is_that_of_the_design(effect, seeds, power):
    """Of one claim among five at Holm's first level, by effect over spread."""
    rng = np.random.default_rng(1)
    x = rng.normal(effect, 1, (4000, seeds))
    first = stats.ttest_1samp(x, 0, axis=1).pvalue < 0.01
    assert abs(first.mean() - power) < 0.03


@pytest.mark.parametrize(("mean", "deviation", "margin"), [(1, 1, 0.1), (0.5, 1, 0.1), (0, 1, 1), (0.02, 0.046, 0.05)])
def test_the_number_of_seeds_that_would_decide_is_right(mean, deviation, margin):
    """At that number 80 % of studies are decided, and with two seeds fewer not many more."""
    n = seeds_needed(mean, deviation, margin)
    rng = np.random.default_rng(2)

    def decided(n):
        x = rng.normal(mean, deviation, (4000, n))
        error = x.std(1, ddof=1) / math.sqrt(n)
        difference = stats.ttest_1samp(x, 0, axis=1).pvalue < 0.01
        alike = stats.t.sf((margin - abs(x.mean(1))) / error, n - 1) < 0.05
        return max(difference.mean(), alike.mean())

    assert decided(n) > 0.78
    assert decided(n - 2) < 0.82


# ---------------------------------------------------------------- the rule


def test_the_four_outcomes():
    """By sign, by margin, and undecided with the seeds that would decide."""
    spread = np.array([-1, -0.6, -0.3, 0.3, 0.6, 1]) * 0.1
    outcomes = {
        shift: decide({"steps": shift + width * spread}, MARGINS)["steps"].outcome
        for shift, width in ((2, 1), (-2, 1), (0.01, 1), (0.3, 1), (0.4, 40))
    }
    assert list(outcomes.values()) == [
        "supported",
        "contradicted",
        "no material difference",
        "supported",
        "undecided",
    ]
    undecided = decide({"steps": 0.4 + 10 * spread}, MARGINS)["steps"]
    assert undecided.seeds_needed > 6
    assert decide({"steps": 2 + spread}, MARGINS)["steps"].seeds_needed is None


def test_a_small_effect_is_immaterial_however_sure():
    """An effect within the margin is no support, even where it is not 0."""
    x = np.array([0.011, 0.012, 0.013, 0.011, 0.012, 0.013]) / 10
    d = decide({"trade-off": x}, MARGINS)["trade-off"]
    assert d.pvalue < 1e-4
    assert d.outcome == "no material difference"


@pytest.mark.parametrize("values", [[2.0], [2.0, 2.1, 2.2, 2.1, 2.0], [2.0, 2.1, 2.2, 2.1, 2.0, math.nan]])
def test_too_few_seeds_or_a_missing_number_decide_nothing(values):
    """Fewer than six seeds; a number that is not there is not left out."""
    d = decide({"steps": values}, MARGINS)["steps"]
    assert d.outcome == "undecided"
    assert d.seeds == len(values)


def test_seeds_that_agree_to_the_last_bit_decide():
    """A spread of 0 is no error: every seed has the same number."""
    assert decide({"steps": [1.0] * 6}, MARGINS)["steps"].outcome == "supported"
    assert decide({"steps": [0.0] * 6}, MARGINS)["steps"].outcome == "no material difference"


def test_holm_is_the_textbook_s():
    """0.01, 0.04, 0.03 become 0.03, 0.06, 0.06."""
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])


def test_the_interval_is_student_s():
    """The same as scipy's."""
    x = np.random.default_rng(0).normal(1, 2, 9)
    expected = stats.ttest_1samp(x, 0).confidence_interval(0.95)
    np.testing.assert_allclose(interval(x), (x.mean(), *expected))
