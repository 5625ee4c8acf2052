"""Setup twins: a pair of models, one of which saw texts at known doses; nothing is trained."""

import csv
import json
import shutil

import numpy as np
import pytest
import tiny
import typer.testing
from study_settings import TINY
from twin_texts import SETTINGS, config_of, dosed, read, texts_of, write

from pyunlearn.cli import main as cli
from pyunlearn.data import Example, encode
from pyunlearn.errors import ArgumentError, ModelError
from pyunlearn.output import read_arrays
from pyunlearn.study import StudyConfig, evaluate_metrics, run_study, seeds, training
from pyunlearn.study.claims import CLAIMS, primary_claims
from pyunlearn.study.folder import Folder
from pyunlearn.study.outcomes import examples_of, outcomes_of
from pyunlearn.study.page import notes_of_twins
from pyunlearn.study.runs import jobs
from pyunlearn.study.sets import NOBODY, ForgetSet
from pyunlearn.study.twins import kinds_of, twin_sets

pytestmark = pytest.mark.usefixtures("one_thread")

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Train two models on as many rows: one on the texts too, the other on further facts in their places.

    Writes the corpus in two files.
    """
    folder, tokenizer = tmp_path_factory.mktemp("pair"), tiny.make_tokenizer()
    rows = dosed(("id", "canary"))
    texts = [row["text"] for row in rows] + texts_of(600, 6)
    tokens = encode([Example("", t) for t in texts], tokenizer, role="text", max_length=48, truncate=True)
    copies = [i for i, row in enumerate(rows) for _ in range(row["duplicates"])]
    config = StudyConfig(**{**TINY, "setup": "text", "batch_size": 8, "learning_rate": 5e-3, "warmup": 10})
    background = list(range(len(rows), len(rows) + 100))
    for name, inserted in (("seen", copies), ("unseen", [len(rows) + 100 + n for n, _ in enumerate(copies)])):
        epochs = [background + inserted[part::2] for part in range(2)]
        training.train(Folder(folder, {}), name, config, tokenizer, tokens, epochs, seed=0, device="cpu")
    write(folder / "train.jsonl", [r for r in rows if r["duplicates"]])
    write(folder / "test.jsonl", [r for r in rows if not r["duplicates"]])
    return folder


def arguments(pair, **changes):
    """Return the arguments of a study of the pair."""
    models = {"checkpoint": str(pair / "models" / "seen"), "twin": str(pair / "models" / "unseen")}
    return {**SETTINGS, **models, "corpus": [pair / "train.jsonl", pair / "test.jsonl"], **changes}


@pytest.fixture(scope="module")
def finished(pair, tmp_path_factory):
    return run_study(tmp_path_factory.mktemp("twins") / "out", **arguments(pair))


def rows_of(study, name):
    with open(study.folder / name) as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------- from end to end


@pytest.mark.full
def test_a_pair_of_models_decides_the_claims(finished):
    """All five with two kinds of text; the page says that the unit is a set of texts of one pair."""
    assert [c.name for c in finished.claims] == list(CLAIMS)
    for claim in finished.claims[-2:]:
        assert len(claim.contrasts) == 6
        assert np.isfinite(claim.contrasts).all()
    for text in ((finished.folder / "index.html").read_text(), (finished.folder / "study.yaml").read_text()):
        assert "of one pair of models" in text
    page = (finished.folder / "index.html").read_text()
    assert "verdicts are about this pair" in page
    assert "training rows were out of distribution" not in page
    assert not (finished.folder / "models").exists()


@pytest.mark.full
def test_memorization_is_the_difference_of_the_pair(finished):
    """Texts seen sixteen times are memorized, those of dose 0 are not; the difficulty is the NLL under the twin."""
    table = rows_of(finished, "examples.csv")
    by_dose = {dose: [float(r["memorization"]) for r in table if r["dose"] == dose] for dose in ("0", "2", "16")}
    assert abs(np.mean(by_dose["0"])) < np.mean(by_dose["16"]) / 4
    assert np.mean(by_dose["16"]) > np.mean(by_dose["2"]) > 0
    seen, unseen = (read_arrays(finished.folder / "scores" / f"{n}.safetensors")["nll"] for n in ("checkpoint", "twin"))
    np.testing.assert_allclose([float(r["nll_trained"]) for r in table], seen, rtol=1e-6)
    np.testing.assert_allclose([float(r["difficulty"]) for r in table], unseen, rtol=1e-6)
    np.testing.assert_allclose([float(r["memorization"]) for r in table], unseen - seen, atol=1e-6)
    assert {r["seed"] for r in table if r["dose"] == "0"} == {str(NOBODY)}


@pytest.mark.full
def test_the_sets_of_every_seed_are_unlearned_from_the_checkpoint(finished):
    """Each run starts at the scores of the checkpoint, whichever ran before it in the same process."""
    table = rows_of(finished, "examples.csv")
    for seed in ("0", "5"):
        run = read_arrays(finished.folder / "runs" / f"id-dose16-seed{seed}-lr0.0003.safetensors")
        own = [float(r["nll_trained"]) for r in table if (r["kind"], r["dose"], r["seed"]) == ("id", "16", seed)]
        np.testing.assert_allclose(run["nll"][0], own, rtol=1e-5)
        assert run["nll"][-1].mean() > run["nll"][0].mean()
        assert run["non_member_nll"].shape[1] == 19


@pytest.mark.slow
@pytest.mark.full
def test_texts_without_kinds_decide_memorization_and_difficulty_alone(pair, finished, tmp_path):
    """Holm over two; the numbers are those of the study with both kinds where the texts are the same."""
    for name in ("train", "test"):
        rows = [json.loads(line) for line in (pair / f"{name}.jsonl").read_text().splitlines()]
        write(
            tmp_path / f"{name}.jsonl", [{k: r[k] for k in ("text", "duplicates")} for r in rows if r["kind"] == "id"]
        )
    corpus = [tmp_path / "train.jsonl", tmp_path / "test.jsonl"]
    made = run_study(tmp_path / "out", **arguments(pair, corpus=corpus))
    assert [c.name for c in made.claims] == ["memorization", "difficulty"]
    assert made.config.kinds == ("id",)
    assert any("the claims that compare kinds are not decided" in note for note in made.notes)
    plan = (made.folder / "study.yaml").read_text()
    assert "Holm over 2 claims" in plan
    assert "trade-off:" not in plan
    assert StudyConfig.read(made.folder / "config.json") == made.config
    again = run_study(tmp_path / "out", **arguments(pair, corpus=corpus))
    assert again.plan == made.plan


@pytest.mark.slow
@pytest.mark.full
def test_an_interrupted_study_of_twins_resumes_to_the_same_files(pair, finished, tmp_path, monkeypatch):
    """Stopped between the two models and between two runs, and shared by two processes at last."""
    real = {name: getattr(seeds, name) for name in ("_score", "unlearn_set")}
    for name, after in (("_score", 1), ("unlearn_set", 3)):
        calls = []

        def stop(*values, name=name, calls=calls, after=after):
            calls.append(1)
            if len(calls) > after:
                raise KeyboardInterrupt
            return real[name](*values)

        monkeypatch.setattr(seeds, name, stop)
        with pytest.raises(KeyboardInterrupt):
            run_study(tmp_path, **arguments(pair))
        monkeypatch.setattr(seeds, name, real[name])
    assert len(list((tmp_path / "runs").iterdir())) == 3
    run_study(tmp_path, **arguments(pair, processes=2))
    for part in ("runs", "scores", "figures"):
        files = sorted((finished.folder / part).iterdir())
        assert [f.name for f in files] == sorted(f.name for f in (tmp_path / part).iterdir())
        assert all(f.read_bytes() == (tmp_path / part / f.name).read_bytes() for f in files)
    for name in ("study.yaml", "claims.json", "contrasts.csv", "examples.csv"):
        assert (finished.folder / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.full
def test_the_command_prints_the_decisions(pair, finished):
    """The same settings find the study finished; its notes are printed, and --json gives claims.json."""
    words = [x for k, v in arguments(pair).items() if k != "corpus" for x in (f"--{k.replace('_', '-')}", v)]
    words = [json.dumps(list(w)) if isinstance(w, tuple) else str(w) for w in words]
    words += [w for name in ("train", "test") for w in ("--corpus", str(pair / f"{name}.jsonl"))]
    run = typer.testing.CliRunner().invoke(cli.program(), ["study", "--out", str(finished.folder), *words, "--quiet"])
    assert run.exit_code == 0, run.exception
    assert "disjoint draws of sets of texts of one pair of models" in run.stdout
    made = typer.testing.CliRunner().invoke(cli.program(), ["study", "--out", str(finished.folder), *words, "--json"])
    assert [c["claim"] for c in json.loads(made.stdout)["claims"]] == list(CLAIMS)


@pytest.mark.full
def test_the_metrics_are_not_evaluated_on_twins(finished):
    """In one sentence, and nothing is written."""
    with pytest.raises(ArgumentError, match="is one of twins, with one model that saw its texts"):
        evaluate_metrics(finished.folder)
    assert not (finished.folder / "metrics").exists()


# ---------------------------------------------------------------- estimands and sets, without a model


def test_sets_are_disjoint_and_of_their_dose(tmp_path):
    """Each text is in one set at most; non-members and test texts are those of dose 0."""
    texts, config = read(dosed(("id", "canary")), tmp_path), config_of()
    assert kinds_of(config, texts) == ("id", "canary")
    tokenizer = tiny.make_tokenizer()
    sets = twin_sets(config, texts, None, tokenizer)
    groups = [*sets.forget.values(), sets.test]
    assert sum(map(len, groups)) == len({i for g in groups for i in g}) == len({t.ids for t in sets.tokens})
    doses = {t.example.completion: (t.kind, t.dose) for t in texts}
    for which, indices in sets.forget.items():
        assert {doses[tokenizer.decode(sets.tokens[i].ids[1:])] for i in indices} == {which[:2]}
        assert len(indices) == (config.examples if which.dose else 19)
    assert {doses[tokenizer.decode(sets.tokens[i].ids[1:])] for i in sets.test} == {("id", 0)}
    assert sets.non_members("id", 3, 99) == sets.forget[ForgetSet("id", 0, NOBODY)]
    assert {which.seed for which in sets.forget} == {NOBODY, *range(6)}
    other = twin_sets(config_of(seed=1), texts, None, tokenizer)
    assert [t.ids for t in other.tokens] != [t.ids for t in sets.tokens]


def test_the_twin_is_where_retraining_ends(tmp_path):
    """Distance, difficulty and memorization by hand; planted speeds give back the slopes that made them."""
    rng, config = np.random.default_rng(0), config_of(kinds=("id",), seeds=3, doses=(1, 2))
    sets = twin_sets(config, read(dosed(doses=(0, 1, 2)), tmp_path), None, tiny.make_tokenizer())
    folder, count = Folder(tmp_path / "out", {}), len(sets.scored())
    seen, unseen = rng.normal(2, 0.5, (2, count))
    for name, nll in (("checkpoint", seen), ("twin", unseen)):
        folder.arrays(f"scores/{name}.safetensors", nll=nll, test_nll=np.array(1.0))
    runs, position = {}, {i: n for n, i in enumerate(sets.scored())}
    for job in (job for seed in range(3) for job in jobs(config, sets, seed)):
        mine = [position[i] for i in sets.forget[job.which]]
        speed = 0.1 * 2 ** (-0.5 * unseen[mine]) * job.which.dose**-0.25
        runs[job.which] = {
            "steps": np.arange(3),
            "nll": seen[mine] + np.outer(np.arange(3), speed),
            "non_member_nll": rng.normal(2, 0.5, (3, 19)),
            "test_nll": np.array([1.0, 1.5, 3.0]),
        }
        folder.arrays(job.file, **runs[job.which])
    examples = examples_of(folder, config, sets)
    np.testing.assert_allclose(examples.memorization, unseen - seen)
    outcomes = outcomes_of(folder, config, sets, examples)
    for o in outcomes:
        mine = [position[i] for i in sets.forget[o.which]]
        np.testing.assert_allclose(o.distance, runs[o.which]["nll"] - unseen[mine])
        np.testing.assert_allclose(examples.at(examples.difficulty, o.indices), unseen[mine])
    nobody = sets.forget[ForgetSet("id", 0, NOBODY)]
    np.testing.assert_allclose(examples.calibration_without(0, nobody), unseen[[position[i] for i in nobody]])
    memorization, difficulty = primary_claims(config, examples, outcomes)
    for seed in range(3):
        hard = [unseen[[position[i] for i in sets.forget[ForgetSet("id", d, seed)]]] for d in (1, 2)]
        means = [np.log2(np.mean(2 ** (-0.5 * x))) for x in hard]
        assert memorization.contrasts[seed] == pytest.approx(0.25 + means[0] - means[1])
        assert difficulty.contrasts[seed] == pytest.approx(0.5 * np.sqrt(np.mean([x.var() for x in hard])))


@pytest.mark.parametrize("swapped", [False, True])
def test_a_pair_that_is_swapped_has_a_note(tmp_path, swapped):
    """Where texts of the largest dose are memorized no more than those of dose 0; nothing is said where they are."""
    config = config_of(kinds=("id",))
    sets = twin_sets(config, read(dosed(), tmp_path), None, tiny.make_tokenizer())
    folder, owners = Folder(tmp_path / "out", {}), sets.owners()
    nll = {"twin": np.full(len(owners), 3.0), "checkpoint": np.array([3 - owners[i].dose / 10 for i in sets.scored()])}
    if swapped:
        nll = {"twin": nll["checkpoint"], "checkpoint": nll["twin"]}
    for name, values in nll.items():
        folder.arrays(f"scores/{name}.safetensors", nll=values, test_nll=np.array(1.0))
    notes = notes_of_twins(config, sets, examples_of(folder, config, sets), [])
    expected = [
        "texts of dose 16 (kind id) is -1.600 nats on average, and no more than that of the texts of dose 0, +0"
    ]
    assert [text for text in expected if any(text in note for note in notes)] == (expected if swapped else [])
    assert any("perhaps the pair is swapped" in note for note in notes) == swapped


# ---------------------------------------------------------------- models that cannot be used


@pytest.mark.full
def test_models_that_are_no_pair_are_refused(pair, tmp_path):
    """Another vocabulary, another tokenizer, an encoder-decoder, a missing model: one sentence, nothing written."""
    tokenizer = tiny.make_tokenizer()
    for name, model in (("large", tiny.tiny_llama(len(tokenizer) + 8)), ("t5", tiny.tiny_t5(len(tokenizer)))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    shutil.copytree(pair / "models" / "unseen", tmp_path / "other")
    tiny.make_tokenizer(form="$A").save_pretrained(tmp_path / "other")
    for twin, error, message in (
        ("large", ModelError, "the twin has another vocabulary than the model"),
        ("t5", ModelError, "takes causal models"),
        ("other", ModelError, "disagree on 110 of 110 texts"),
        ("missing", ModelError, "nothing is there"),
    ):
        with pytest.raises(error, match=message) as caught:
            run_study(tmp_path / "out", **arguments(pair, twin=str(tmp_path / twin)))
        assert "\n" not in str(caught.value)
    with pytest.raises(ArgumentError, match=r"max_tokens is 500, and .* reads 96 at most"):
        run_study(tmp_path / "out", **arguments(pair, max_tokens=500))
    assert not (tmp_path / "out").exists()
