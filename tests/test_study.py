"""The study: its sets, its statistics, and a very small one from end to end."""

import csv
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import typer.testing

from pyunlearn.cli import main as cli
from pyunlearn.errors import ArgumentError, DataError, OutputError
from pyunlearn.metrics import StepsToForget, generalized_exposure
from pyunlearn.models.from_scratch import train_tokenizer
from pyunlearn.study import PRESETS, claims, outcomes, run_study, statistics, study, training
from pyunlearn.study import runs as study_runs
from pyunlearn.study.claims import CLAIMS
from pyunlearn.study.config import configured, parsed
from pyunlearn.study.corpus import read_corpus, synthetic
from pyunlearn.study.folder import Folder
from pyunlearn.study.sets import ForgetSet, Sets, make_sets

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
pytest.importorskip("sacrebleu")
TINY = {
    "corpus_size": 260, "vocabulary": 120, "examples": 4, "references": 19, "repetitions": (1, 10), "test_examples": 12, "bleu_examples": 4,
    "subset_models": 2, "shared_epochs": 1, "epochs": 2, "background": 32, "warmup": 5, "steps": 4, "every": 2, "bleu_every": 2,
    "kinds": ("id", "canary"), "unlearning_rates": (1e-2,),
}  # fmt: skip
MADE = (
    "claims.csv",
    "claims.json",
    "examples.csv",
    "models.csv",
    "steps.csv",
    "example_steps.csv",
    "steps_to_forget.csv",
    "index.html",
)


def digests(folder: Path) -> dict[str, str]:
    """Of every file that a study makes for people."""
    files = [folder / name for name in MADE] + sorted((folder / "figures").iterdir())
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run_study(tmp_path_factory.mktemp("study") / "out", **TINY)


# ---------------------------------------------------------------- end to end


def test_a_study_ends_with_a_verdict_on_every_claim(finished):
    """With tables, figures in both forms and a page that needs nothing from elsewhere."""
    assert [c.name for c in finished.claims] == list(CLAIMS)
    for claim in finished.claims:
        assert claim.verdict in ("supported", "not supported", "undecided")
        assert claim.findings
        for f in claim.findings:
            assert not math.isfinite(f.low) or f.low - 1e-9 <= f.effect <= f.high + 1e-9
            assert 0 <= f.pvalue <= f.pvalue_holm <= 1
            assert f.n >= 20 or f.verdict == "undecided"
    for name in MADE:
        assert (finished.folder / name).stat().st_size > 0
    assert (
        len(list((finished.folder / "figures").glob("*.svg")))
        == len(list((finished.folder / "figures").glob("*.png")))
        == 5
    )
    page = (finished.folder / "index.html").read_text()
    assert all(text in page for text in CLAIMS.values())
    assert "<script" not in page
    assert not [x for x in page.split('src="')[1:] if x.startswith("http")]


def test_each_step_s_numbers_are_those_of_the_trajectory(finished):
    """The tables say what the runs' arrays hold; the first row of a run is the model before unlearning."""
    with open(finished.folder / "steps.csv") as file:
        rows = [r for r in csv.DictReader(file) if (r["kind"], r["repetitions"]) == ("id", "10")]
    run = np.load(finished.folder / "runs" / "id-r10-draw0-lr0.01.npz")
    assert [int(r["step"]) for r in rows] == run["steps"].tolist() == [0, 2, 4]
    np.testing.assert_allclose([float(r["nll"]) for r in rows], run["nll"].mean(1), rtol=1e-6)
    assert float(rows[0]["reference_drift"]) == 0 == float(rows[0]["moved"])
    assert run["nll"][-1].mean() > run["nll"][0].mean()
    trained = np.load(finished.folder / "scores" / "main-0.npz")
    assert float(rows[0]["test_nll"]) == pytest.approx(float(trained["test_nll"]), rel=1e-6)


def test_anchored_and_current_calibrated_and_raw_are_what_they_say(tmp_path):
    """Anchored references are those of step 0; calibrated scores lose the difficulty, of the references too. All four differ here."""
    rng = np.random.default_rng(3)
    config = configured("smoke", {**TINY, "unlearning_rates": (0.1,)})
    which = ForgetSet("id", 1, 0)
    sets = Sets([], [], [], [], [], {"id": list(range(3, 23))}, {which: [0, 1, 2]})
    nll, unseen, ease = rng.normal(2, 0.5, (2, 3)), rng.normal(2, 0.5, (2, 20)), rng.normal(2, 0.5, 23)
    unseen[1] += 0.6
    folder = Folder(tmp_path / "out", {})
    rest = {name: np.zeros(2) for name in ("test_nll", "bleu", "moved")}
    folder.arrays(f"runs/{which}-lr0.1.npz", steps=np.arange(2), nll=nll, accuracy=nll, reference_nll=unseen, **rest)
    known = outcomes.Examples(list(range(23)), ease, ease, ease, ease, ease)
    (found,) = outcomes.outcomes_of(folder, config, sets, known)
    wanted = {}
    for where, references in (("anchored", unseen[0]), ("current", unseen[1])):
        wanted[f"{where} raw"] = generalized_exposure(nll[1], references)
        wanted[f"{where} calibrated"] = generalized_exposure(nll[1] - ease[:3], references - ease[3:])
    assert len({tuple(w.lower) for w in wanted.values()}) == 4
    for yardstick, w in wanted.items():
        np.testing.assert_allclose(found.lower[yardstick][1], w.lower)
        np.testing.assert_allclose(found.upper[yardstick][1], w.upper)
    np.testing.assert_allclose(found.drift, [0, (unseen[1] - unseen[0]).mean()])
    np.testing.assert_allclose(found.from_retrained, np.abs(nll - ease[:3]).mean(1))


def test_lowest_exposure_ends_where_the_budget_does_and_price_where_the_threshold_is():
    """What comes after the budget is spent does not count, even if the test NLL comes back; a set that never gets there has no price."""
    exposures = np.array([[6.0, 4.0], [4.0, 2.0], [1.0, 1.0], [0.5, 0.5]])
    rise = np.array([2.0, 2.05, 2.5, 2.02])
    o = outcomes.Outcome(
        None,
        0.1,
        [0, 1],
        np.arange(4),
        exposures,
        exposures,
        {"y": exposures},
        {"y": exposures},
        rise,
        rise,
        rise,
        rise,
        rise,
        rise,
    )
    assert o.lowest("y", 0.1) == 3.0
    assert o.price("y", 1.443) == pytest.approx(0.5)
    assert o.price("y", 0.1) == math.inf


def test_an_interrupted_study_goes_on_to_the_same_files(finished, tmp_path, monkeypatch):
    """Stopped in the middle of a model's training (after a checkpoint), and again between two runs: tables, figures and page are the same, byte for byte."""
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    for where, name, after in ((training, "collate", 9), (study_runs, "_ascend", 2)):
        real, calls = getattr(where, name), []

        def stop(*given, real=real, calls=calls, after=after, **options):
            calls.append(1)
            if len(calls) > after:
                raise KeyboardInterrupt
            return real(*given, **options)

        monkeypatch.setattr(where, name, stop)
        with pytest.raises(KeyboardInterrupt):
            run_study(tmp_path, **TINY)
        monkeypatch.setattr(where, name, real)
        assert bool(list((tmp_path / "models").glob("*.checkpoint"))) == (where is training)
        assert len(list((tmp_path / "runs").glob("*.npz"))) == (0 if where is training else 2)
        assert not (tmp_path / "index.html").exists()
    again = run_study(tmp_path, **TINY)
    assert digests(again.folder) == digests(finished.folder)
    assert not list(again.folder.rglob("*.checkpoint"))
    assert not list(again.folder.rglob(".partial*"))


@pytest.mark.parametrize("setup", ["text", "qa"])
def test_the_other_setups_come_to_verdicts(tmp_path, monkeypatch, setup):
    """A causal model from scratch on plain text, and a checkpoint fine-tuned on questions and answers; of either no BLEU is reported."""
    monkeypatch.setattr(study, "draw_all", lambda *_: None)
    monkeypatch.setattr(study, "write_page", lambda *_: None)
    given = {
        **TINY,
        "setup": setup,
        "repetitions": (4,),
        "kinds": ("id", "mismatched", "canary", "random"),
        "corpus_size": 300,
    }
    if setup == "qa":
        tokenizer = tiny.make_tokenizer()
        tiny.tiny_llama(len(tokenizer)).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        (tmp_path / "qa.jsonl").write_text("\n".join(json.dumps(f) for f in tiny.facts(200, 0)))
        given |= {
            "checkpoint": str(tmp_path / "model"),
            "corpus": tmp_path / "qa.jsonl",
            "kinds": ("id", "mismatched", "random"),
        }
    found = run_study(tmp_path / "out", **given)
    assert [c.name for c in found.claims] == list(CLAIMS)
    run = np.load(tmp_path / "out" / "runs" / "id-r4-draw0-lr0.01.npz")
    assert np.isnan(run["bleu"]).all()
    assert run["nll"][-1].mean() > run["nll"][0].mean()
    trained, retrained = (
        np.load(tmp_path / "out" / "scores" / f"{name}.npz")["nll"] for name in ("main-0", "retrained")
    )
    assert trained[-4:].mean() < retrained[-4:].mean()


def test_a_finished_study_is_not_done_again(finished, monkeypatch):
    """The same call trains nothing; a call with other settings is refused before anything is written."""

    def never(*_, **__):
        raise AssertionError

    monkeypatch.setattr(study_runs, "_ascend", never)
    monkeypatch.setattr(training, "new_model", never)
    before = digests(finished.folder)
    run_study(finished.folder, **TINY)
    assert digests(finished.folder) == before
    with pytest.raises(OutputError, match="another steps"):
        run_study(finished.folder, **{**TINY, "steps": 6})
    assert digests(finished.folder) == before


@pytest.mark.parametrize(
    ("effect", "low", "high", "p", "n", "says"),
    [(0.7, 0.6, 0.8, 0.01, 40, "supported"), (0.7, 0.6, 0.8, 0.2, 40, "undecided"), (0.7, 0.45, 0.8, 0.01, 40, "undecided"),
     (0.3, 0.2, 0.4, 0.01, 40, "not supported"), (0.5, 0.46, 0.54, 0.9, 400, "not supported"), (0.5, 0.3, 0.7, 0.9, 40, "undecided"),
     (0.9, 0.8, 1.0, 0.001, 10, "undecided"), (math.nan, math.nan, math.nan, 1.0, 0, "undecided")],
)  # fmt: skip
def test_a_verdict_needs_interval_test_and_numbers(effect, low, high, p, n, says):
    """A null result is one where every effect that would matter is ruled out; few examples decide nothing, whatever they say."""
    found = claims._verdict(statistics.Effect(effect, low, high, p, n), "share", 0.5, "stratified log-rank")
    assert found == says


def test_a_claim_is_decided_only_where_comparisons_agree():
    """One that speaks against it, and the claim is undecided; what it depends on is named."""
    effects = {True: statistics.Effect(0.8, 0.7, 0.9, 0.01, 40), False: statistics.Effect(0.2, 0.1, 0.3, 0.01, 40)}

    def judge(*says):
        rows = [
            ("same", "canary", 0.1, f"yardstick {i}", "share", 0.5, "log-rank", effects[s]) for i, s in enumerate(says)
        ]
        return claims.judged(claims._adjusted("steps", rows))[0]

    assert judge(True, True, True).verdict == "supported"
    assert judge(False, False, False).verdict == "not supported"
    mixed = judge(True, True, False)
    assert mixed.verdict == "undecided"
    assert "depends on the yardstick" in mixed.why


# ---------------------------------------------------------------- sets


def sets_of(**changes):
    config = configured(
        "smoke", {**TINY, "kinds": ("id", "mismatched", "canary", "random"), "draws": 2, "corpus_size": 500, **changes}
    )
    corpus = synthetic(config.setup, config.corpus_size, config.seed)
    tokenizer = train_tokenizer((t for e in corpus for t in (e.prompt, e.completion)), config.vocabulary)
    return config, corpus, make_sets(config, corpus, None, tokenizer)


@pytest.mark.parametrize("setup", ["translation", "text"])
def test_sets_are_matched_and_apart(setup):
    """As many examples of every kind; canaries and random tokens as long as the ordinary ones, one by one; nothing stands in two groups."""
    config, _, sets = sets_of(setup=setup)
    assert {len(places) for places in sets.forget.values()} == {config.examples}
    assert {len(places) for places in sets.references.values()} == {config.references}
    for which, places in sets.forget.items():
        if which.kind in ("canary", "random"):
            natural = sets.forget[which._replace(kind="id")]
            assert [len(sets.tokens[i].scored) for i in places] == [len(sets.tokens[i].scored) for i in natural]
    groups = [*sets.forget.values(), *sets.references.values(), sets.background, sets.test]
    assert (
        sum(map(len, groups)) == len({i for g in groups for i in g}) == len({(t.ids, t.decoder) for t in sets.tokens})
    )


def test_nothing_unseen_is_trained_on():
    """References and test examples are in no epoch; subset models leave out exactly what their mask says, and repeat the rest."""
    config, _, sets = sets_of()
    unseen = {i for g in (*sets.references.values(), sets.test) for i in g}
    assert not unseen & set(sets.members(None)) | unseen & set(sets.background)
    masks = sets.subsets(config)
    assert set(masks) == set(sets.watched())
    for k in range(config.subset_models):
        chosen = {i for i, mask in masks.items() if mask[k]}
        members = sets.members(None, chosen)
        assert set(members) == chosen - unseen
        for which, places in sets.forget.items():
            assert all(members.count(i) == which.repetitions for i in places if i in chosen)
    assert {which.draw for which, p in sets.forget.items() if set(p) & set(sets.members(1))} == {1}


def test_a_corpus_that_is_too_small_is_refused():
    """With what it would take."""
    with pytest.raises(DataError, match="500 different examples, and the study needs"):
        sets_of(examples=100)


# ---------------------------------------------------------------- statistics


def taken(*steps, cut=()):
    return StepsToForget(np.array(steps, dtype=float), np.isin(np.arange(len(steps)), cut))


def test_censored_steps_are_compared_where_they_can_be():
    """What ended at a step is shorter than what was still exposed there; two censored ones are a tie."""
    assert statistics.longer(taken(1, 2), taken(3, 4)) == 1
    assert statistics.longer(taken(5), taken(5, cut=[0])) == 1
    assert statistics.longer(taken(5, cut=[0]), taken(5, cut=[0])) == 0.5
    assert statistics.longer(taken(5, cut=[0]), taken(9)) == 0.5
    a, b = taken(1, 4, 9, 9, cut=[3]), taken(2, 4, 8)
    assert statistics.longer(a, b) == pytest.approx(1 - statistics.longer(b, a))


def test_steps_effect_finds_a_difference_and_no_other():
    """Longer steps give a share near 1 and a small p; steps of one law give an interval around one half (in 5 of 5 draws)."""
    rng = np.random.default_rng(0)

    def draw(mean):
        x = rng.geometric(1 / mean, 30).astype(float)
        return StepsToForget(np.minimum(x, 20), x > 20)

    found = statistics.steps_effect([(draw(3), draw(12)) for _ in range(3)])
    assert found.low > 0.6
    assert found.pvalue < 1e-3
    for _ in range(5):
        null = statistics.steps_effect([(draw(6), draw(6)) for _ in range(3)])
        assert null.low < 0.5 < null.high
        assert null.pvalue > 0.01


def test_rank_correlation_is_within_sets_and_counts_censored_ones_highest():
    """Two sets that differ as wholes but not within have none; the sign is that of the relation."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 40))
    apart = [(x[0], taken(*rng.integers(1, 9, 40))), (x[1] + 10, taken(*(20 + rng.integers(1, 9, 40))))]
    assert abs(statistics.rank_correlation(apart).effect) < 0.3
    steps = np.argsort(np.argsort(x[0])).astype(float)
    for sign in (1, -1):
        found = statistics.rank_correlation([(sign * x[0], StepsToForget(np.minimum(steps, 30), steps > 30))])
        assert sign * found.effect > 0.9
        assert found.pvalue < 0.01


def test_holm_is_the_textbook_s():
    """0.01, 0.04, 0.03 become 0.03, 0.06, 0.06."""
    np.testing.assert_allclose(statistics.holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])


def test_never_is_dearer_than_any_price():
    """An infinite price loses against a finite one, and ties with another."""
    inf = math.inf
    assert statistics.wins([1.0, inf, inf], [0.5, 2.0, inf])[0] == 1.0
    assert statistics.wins([inf], [inf]).pvalue == 1


# ---------------------------------------------------------------- what is given


def test_corpora_are_read_in_every_form(tmp_path):
    """Two files of parallel lines, pairs parted by tabs, questions and answers, plain text."""
    (tmp_path / "a.en").write_text("one\ntwo\n")
    (tmp_path / "a.de").write_text("eins\nzwei\n")
    (tmp_path / "a.tsv").write_text("one\teins\ntwo\tzwei\n")
    (tmp_path / "a.jsonl").write_text('{"question": "who?", "answer": "I"}\n')
    (tmp_path / "a.txt").write_text(" ".join(["word"] * 50))
    pairs = [("one", "eins"), ("two", "zwei")]
    assert [(e.prompt, e.completion) for e in read_corpus([tmp_path / "a.en", tmp_path / "a.de"])] == pairs
    assert [(e.prompt, e.completion) for e in read_corpus([tmp_path / "a.tsv"])] == pairs
    assert read_corpus([tmp_path / "a.jsonl"])[0].messages
    assert [len((e.prompt + e.completion).split()) for e in read_corpus([tmp_path / "a.txt"])] == [24, 24]
    (tmp_path / "a.de").write_text("eins\n")
    with pytest.raises(DataError, match=r"2 lines and .* has 1"):
        read_corpus([tmp_path / "a.en", tmp_path / "a.de"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"step": 3}, 'did you mean "steps"'), ({"examples": 2}, "examples of 4"), ({"kinds": ("canary",)}, '"id" and at least one other'),
     ({"method": "dpo"}, "reads the forget text alone"), ({"setup": "qa"}, "fine-tunes a checkpoint"), ({"steps": 0}, "steps must be a whole number"),
     ({"unlearning_rates": (2.0,)}, "unlearning_rates must lie")],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(tmp_path, changes, says):
    """In one sentence, before anything is written."""
    with pytest.raises(ArgumentError, match=says):
        run_study(tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_every_preset_is_valid():
    """And the command line's changes are read as JSON."""
    assert list(PRESETS) == ["smoke", "cpu", "gpu", "paper"]
    assert all(configured(name, {}).preset == name for name in PRESETS)
    assert parsed(["steps=7", "unlearning_rates=[0.1]", "size=base"]) == {
        "steps": 7,
        "unlearning_rates": [0.1],
        "size": "base",
    }


def test_the_command_goes_on_with_a_study(finished):
    """`pyunlearn study` with the same settings finds it done, prints the verdicts and leaves with 0; with others it leaves with 2."""
    changes = [x for k, v in TINY.items() for x in ("--set", f"{k}={json.dumps(v)}")]

    def run(*more):
        return typer.testing.CliRunner().invoke(cli.app, ["study", "--out", str(finished.folder), *changes, *more])

    found = run("--json")
    assert found.exit_code == 0
    assert [c["claim"] for c in json.loads(found.stdout)] == list(CLAIMS)
    refused = run("--set", "seed=5")
    assert isinstance(refused.exception, OutputError)
