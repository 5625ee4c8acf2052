"""The study's distances, steps and contrasts, on numbers made by hand."""

import numpy as np
import pytest
from study_settings import TINY

from pyunlearn.metrics import NULL_MEAN, generalized_exposure
from pyunlearn.study import claims, outcomes
from pyunlearn.study.claims import Claim
from pyunlearn.study.config import StudyConfig
from pyunlearn.study.decisions import decide
from pyunlearn.study.folder import Folder
from pyunlearn.study.outcomes import RETRAINED, Outcome
from pyunlearn.study.runs import jobs
from pyunlearn.study.sets import ForgetSet, Sets
from pyunlearn.study.tables import decision_row

DOSES = (1, 4, 16)


def made(tmp_path, seeds=5, n=3):
    """Write a study of one run for each seed with random numbers; return what was drawn, and what is read of it."""
    rng = np.random.default_rng(3)
    config = StudyConfig(**{**TINY, "seeds": seeds, "doses": (1, 2)})
    forget = {ForgetSet("id", 1, s): list(range(n * s, n * s + n)) for s in range(seeds)}
    sets = Sets([], [], [], [], forget)
    folder = Folder(tmp_path / "out", {})
    nll = rng.normal(2, 0.5, (seeds, seeds * n))
    trajectories = {}
    for seed in range(seeds):
        folder.arrays(f"scores/seed-{seed}.safetensors", nll=nll[seed], test_nll=np.array(1.0))
        (job,) = jobs(config, sets, seed)
        non_members = sets.non_members("id", seed, config.non_members)
        trajectories[seed] = {
            "steps": np.arange(3),
            "nll": rng.normal(2, 0.5, (3, n)),
            "non_member_nll": rng.normal(2, 0.5, (3, len(non_members))),
            "test_nll": np.array([1.0, 1.5, 3.0]),
        }
        folder.arrays(job.file, **trajectories[seed])
    examples = outcomes.examples_of(folder, config, sets)
    return sets, nll, trajectories, examples, outcomes.outcomes_of(folder, config, sets, examples)


# ---------------------------------------------------------------- distances


def test_the_models_that_never_saw_a_set_are_split_in_two():
    """Every second one calibrates, the rest measure; none is the owner, none is in both."""
    for owner in range(7):
        first, second = outcomes.calibrating(7, owner), outcomes.measuring(7, owner)
        assert sorted(first + second) == [k for k in range(7) if k != owner]
        assert len(first) == len(second) == 3


def test_distances_difficulty_and_memorization_come_from_their_own_models(tmp_path):
    """Distance from the calibrating models, difficulty and memorization from the measuring ones."""
    _, nll, trajectories, examples, results = made(tmp_path)
    (o,) = [r for r in results if r.which.seed == 1]
    np.testing.assert_allclose(o.distance, trajectories[1]["nll"] - nll[[0, 3]][:, 3:6].mean(0))
    np.testing.assert_allclose(examples.at(examples.difficulty, o.indices), nll[[2, 4]][:, 3:6].mean(0))
    np.testing.assert_allclose(examples.at(examples.memorization, o.indices), nll[[2, 4]][:, 3:6].mean(0) - nll[1, 3:6])
    np.testing.assert_allclose(o.rise, [0, 0.5, 2.0])


def test_every_criterion_is_what_it_says(tmp_path):
    """Anchored non-members are those of step 0; calibrated ones lose the mean of models that saw neither set."""
    sets, nll, trajectories, _, results = made(tmp_path)
    (o,) = [r for r in results if r.which.seed == 1]
    run, others = trajectories[1], sets.non_members("id", 1, 99)
    assert others == [0, 1, 2, *range(6, 15)]
    calibrators = {0: [3], 2: [0, 3], 3: [0, 2], 4: [0, 2]}  # every second model, without the owner and without seed 1
    away = run["non_member_nll"] - np.array([nll[calibrators[i // 3], i].mean() for i in others])
    expected = {
        RETRAINED: o.distance.mean(1),
        "anchored NLL": run["nll"].mean(1) - run["non_member_nll"][0].mean(),
    }
    for name, scores, against in (("", run["nll"], run["non_member_nll"]), ("calibrated ", o.distance, away)):
        for when, at in (("anchored", [0, 0, 0]), ("current", [0, 1, 2])):
            bits = [generalized_exposure(scores[t], against[at[t]]).lower.mean() for t in range(3)]
            expected[f"{when} {name}exposure"] = NULL_MEAN - np.array(bits)
    assert set(expected) == set(o.gaps)
    for name, gap in expected.items():
        np.testing.assert_allclose(o.gaps[name], gap, err_msg=name)


def test_a_crossing_is_interpolated_and_censored_where_it_never_comes():
    """From the start, between two measurements, and never; a later return below 0 does not matter."""
    assert outcomes.crossing([0, 2, 4], [0.5, 1, 2]) == (0, False)
    assert outcomes.crossing([0, 2, 4], [-1, 3, -2]) == (0.5, False)
    assert outcomes.crossing([0, 2, 4], [-3, -2, -1]) == (4, True)


# ---------------------------------------------------------------- contrasts


def run_of(kind, dose, seed, step, price, speed=None, n=8):
    """Make a run that is forgotten at `step`, where the test NLL has risen by `price` in a straight line."""
    steps = np.arange(65)
    gap = (steps - step) / step
    nll = 2 + np.outer(steps, np.ones(n) if speed is None else speed)
    return Outcome(
        which=ForgetSet(kind, dose, seed),
        rate=0.1,
        indices=list(range(n)),
        steps=steps,
        nll=nll,
        distance=np.tile(gap[:, None], (1, n)),
        rise=steps * price / step,
        gaps=dict.fromkeys(outcomes.CRITERIA, gap),
    )


def made_examples(difficulty):
    n = len(difficulty)
    zeros = np.zeros(n)
    return outcomes.Examples(
        indices=list(range(n)),
        owner=zeros,
        nll=zeros[None],
        calibration=zeros + 5,
        difficulty=np.array(difficulty, dtype=float),
        memorization=zeros,
    )


def study_of(seeds=6, **changes):
    rng = np.random.default_rng(0)
    x = np.linspace(1, 3, 8)
    settings = {**TINY, "seeds": seeds, "doses": DOSES, "unlearning_rates": (0.1,)}
    config = StudyConfig(**{**settings, "kinds": ("id", "mismatched", "canary")})
    runs = []
    for seed in range(seeds):
        for dose in DOSES:
            wobble, speed = 1 + 0.02 * rng.normal(), 0.1 * 2 ** (-0.5 * x) * dose**-0.25
            runs += [
                run_of("id", dose, seed, 2 * dose**0.5 * wobble, 0.3 * wobble, speed, **changes),
                run_of("canary", dose, seed, 8 * dose**0.5, 0.1, **changes),
                run_of("mismatched", dose, seed, 2 * dose**0.5, 0.3, **changes),
            ]
    return config, made_examples(x), runs


def test_every_contrast_is_what_its_text_says():
    """Four times the steps at every dose: 2 in log2. The rest by hand too."""
    config, examples, runs = study_of()
    decided = {c.name: c for c in claims.primary_claims(config, examples, runs)}
    assert list(decided) == list(claims.CLAIMS)
    means = {name: c.decision.mean for name, c in decided.items()}
    assert means["steps"] == pytest.approx(2, abs=0.05)
    assert means["trade-off"] == pytest.approx(0.2, abs=0.02)
    assert means["decay"] == pytest.approx(4 * 0.3 - 0.1, abs=0.05)  # four times the steps at the same slope
    assert means["memorization"] == pytest.approx(0.25)
    assert means["difficulty"] == pytest.approx(0.5 * np.linspace(1, 3, 8).std())
    assert {c.decision.outcome for c in decided.values()} == {"supported"}


@pytest.mark.parametrize("power", [0.7, 1.4])
def test_a_curved_path_that_all_doses_share_is_no_effect_of_memorization(power):
    """The mean rise a step depends on the number of steps, and sets seen more often take more of them."""
    config, examples, runs = study_of()
    for o in runs:
        o.nll[:] = 2 + 0.1 * np.arange(65)[:, None] ** power
    slopes = claims.primary_claims(config, examples, runs)[3].contrasts
    np.testing.assert_allclose(slopes, 0, atol=1e-9)


def test_the_doses_are_compared_with_themselves():
    """A set that needs more steps at one dose alone changes the mean by a third of it."""
    config, examples, runs = study_of()
    base = claims.primary_claims(config, examples, runs)[0].decision.mean
    changed = [run_of("canary", 4, o.which.seed, 32, 0.1) if o.which[:2] == ("canary", 4) else o for o in runs]
    assert claims.primary_claims(config, examples, changed)[0].decision.mean == pytest.approx(base + 1 / 3)


def test_a_set_that_was_forgotten_from_the_start_counts_as_half_a_step():
    """Its logarithm would be minus infinity; its price is 0."""
    config, examples, runs = study_of()
    start = [run_of("id", 1, o.which.seed, 1e-9, 1e-9) if o.which[:2] == ("id", 1) else o for o in runs]
    contrasts = claims.primary_claims(config, examples, start)[0].contrasts
    assert np.isfinite(contrasts).all()
    assert np.mean(contrasts) == pytest.approx(2 + (np.log2(8 / 0.5) - 2) / 3, abs=0.05)


@pytest.mark.parametrize(("kind", "step"), [("canary", 640), ("id", 640), ("both", 640), ("both", 1e-9)])
def test_runs_that_do_not_tell_a_contrast_decide_nothing(kind, step):
    """A set that is never forgotten, or two that left no trace; the price at the end of a run is no price."""
    config, examples, runs = study_of()
    kinds = ("id", "canary") if kind == "both" else (kind,)
    cut = [run_of(o.which.kind, o.which.dose, o.which.seed, step, 0.6) if o.which.kind in kinds else o for o in runs]
    decided = {c.name: c.decision for c in claims.primary_claims(config, examples, cut)}
    for name in ("steps", "trade-off") if kind == "id" else ("steps", "trade-off", "decay"):
        assert decided[name].outcome == "undecided", name
        assert np.isnan(decided[name].mean)
    if kind == "id":
        assert decided["decay"].outcome != "undecided"
    rows = claims.variants(config, examples, cut, claims.primary_claims(config, examples, cut))
    assert {row.seeds for row in rows if row.claim == "steps" and row.variant.startswith("dose")} == {0}


def test_other_kinds_are_decided_apart():
    """Mismatched sets that need as many steps: no material difference, while canaries need more."""
    config, examples, runs = study_of()
    second = {c.name: c for c in claims.secondary_claims(config, examples, runs)}
    assert {c.kind for c in second.values()} == {"mismatched"}
    assert set(second) == {"steps", "trade-off", "decay"}
    assert second["steps"].decision.outcome == "no material difference"


def test_sensitivity_measures_every_claim_in_other_ways():
    """With the same unit; the share of seeds on the same side; arithmetic alone has its own rows."""
    config, examples, runs = study_of()
    rows = claims.variants(config, examples, runs, claims.primary_claims(config, examples, runs))
    assert {row.claim for row in rows} == set(claims.CLAIMS)
    assert all(0 <= row.agree <= 1 for row in rows if not row.variant.startswith("arithmetic"))
    values = {(row.claim, row.variant): row for row in rows}
    assert values["steps", "dose 4 alone"].mean == pytest.approx(2, abs=0.05)
    assert values["steps", "dose 4 alone"].agree == 1
    assert values["memorization", "steps in all, from unlike starts"].mean == pytest.approx(0.5, abs=0.02)
    one_speed = next(row for row in rows if row.variant.startswith("arithmetic: the same at one speed"))
    assert (one_speed.unit, one_speed.agree, one_speed.seeds) == ("correlation", None, 6)


def test_a_further_kind_is_named_in_its_contrast():
    """Tables of mismatched sets do not speak of canaries."""
    decision = decide({"decay": [0.1, 0.2, 0.3]}, {"decay": 0.02})["decay"]
    rows = {kind: decision_row(Claim("decay", kind, [0.1, 0.2, 0.3], decision)) for kind in ("canary", "mismatched")}
    assert "minus canaries, at the step where the canaries are forgotten" in rows["canary"]["contrast"]
    assert "minus mismatched sets, at the step where the mismatched sets are" in rows["mismatched"]["contrast"]
