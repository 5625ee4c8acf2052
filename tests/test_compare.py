"""Methods at equal utility: the rows, what they were measured on, going on, and what is refused."""

import copy
import csv
import io
import json
import math

import pytest
import tiny
import torch

import pyunlearn
from pyunlearn.comparing import Comparison, comparison_plot, comparison_table, trial
from pyunlearn.comparing.plots import _spread, save_plots
from pyunlearn.data import encode, read_examples
from pyunlearn.errors import ArgumentError, DataError, ModelError, OutputError
from pyunlearn.methods import METHODS
from pyunlearn.probes import teacher_forced

OPTIONS = {"learning_rate": 1e-3, "max_steps": 4, "seed": 0}
TAU = 0.98
UNGUARDED = {"retain_loss": None, "utility_budget": 5.0, "learning_rate": 3e-3, "max_steps": 12}
"""So that a method costs more than TAU allows."""


@pytest.fixture(scope="module")
def trained(one_thread):
    return tiny.trained(tiny.tiny_llama, tiny.sentences, count=200, repeats=8, epochs=6)


def compare(trained, model=None, **options):
    return pyunlearn.compare(
        trained.model if model is None else model, options.pop("forget", trained.forget), tokenizer=trained.tokenizer,
        **{"methods": ["ga", "simnpo"], "retain": trained.retain, "holdout": trained.holdout, **OPTIONS, **options},
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(trained):
    """(the comparison, whether every weight was as before, whether the mode was): of three methods, one of which needs prompts."""
    before = copy.deepcopy(trained.model.state_dict())
    trained.model.train()
    made = compare(trained, methods=["ga", "idk", "SimNPO", "ga"], tau=TAU, **UNGUARDED)
    unchanged = all(torch.equal(before[n], p) for n, p in trained.model.state_dict().items())
    training = trained.model.training
    trained.model.eval()
    return made, unchanged, training


@pytest.fixture
def found(run):
    return run[0]


def alike(a, b):
    """Two rows, but for time and memory."""
    one, other = ({k: v for k, v in vars(r).items() if k not in ("seconds", "peak_memory")} for r in (a, b))
    return one == other


# ---------------------------------------------------------------- the rows


def test_a_row_for_each_method_and_the_model_as_it_came(run):
    """In the order given, once each; one that needs prompts and has none is refused with its reason, and the others are there."""
    found, unchanged, training = run
    assert [(r.method, r.status) for r in found.rows] == [("ga", "done"), ("idk", "refused"), ("simnpo", "done")]
    assert "has no prompt that could be refused" in found.rows[1].reason
    assert not found.complete
    assert unchanged
    assert training


def test_each_method_is_what_unlearn_gives_from_the_same_start(found, trained):
    """The uncalibrated numbers are those of a run by itself, though another method ran before it in the same model."""
    row = found.rows[2]
    alone = pyunlearn.unlearn(
        trained.fresh(), trained.forget, retain=trained.retain, holdout=trained.holdout, tokenizer=trained.tokenizer, method="simnpo",
        **{**OPTIONS, **UNGUARDED},
    )  # fmt: skip
    assert row.uncalibrated.exposures == pytest.approx([e.exposure_after for e in alone.examples], abs=1e-6)
    assert row.uncalibrated.forget_nll.estimate == pytest.approx(
        -sum(e.log_likelihood_after for e in alone.examples) / 2, abs=1e-4
    )
    assert {v for v, n in row.uncalibrated.verdicts.items() if n} == {e.verdict for e in alone.examples}
    assert (row.steps, row.stopped) == (len(alone.history), alone.stopped)


def test_methods_are_measured_at_equal_utility(found, trained):
    """A method that costs more than tau allows is mixed to just above tau, and then forgets less; the original's numbers are the original's."""
    assert all(row.weight < 1 for row in found.rows if row.done)
    for row in (r for r in found.rows if r.done):
        assert found.utility_share(row.uncalibrated) < TAU
        assert TAU <= found.utility_share(row.calibrated) < TAU + 0.005
        assert row.calibrated.exposure.estimate > row.uncalibrated.exposure.estimate
        assert row.seconds > 0
    tokens = encode(read_examples(trained.retain, role="retain"), trained.tokenizer, role="retain", max_length=None)
    forced = teacher_forced(trained.model, tokens)
    assert found.original.utility == pytest.approx(sum(map(math.exp, forced.mean_log_likelihood)) / 60, abs=1e-6)
    assert found.utility_text == "retain set"
    assert found.references == 60
    assert found.original.verdicts["still exposed"] == 2
    assert found.original.exposure.low <= found.original.exposure.estimate <= found.original.exposure.high


def test_the_run_s_own_memory_is_measured(found):
    """Where the system says it: more than nothing, less than the machine's."""
    for row in (r for r in found.rows if r.done):
        assert row.peak_memory is None or 2**20 < row.peak_memory < 2**40


@pytest.mark.parametrize("metric", ["extraction_strength", "greedy_match"])
def test_the_utility_can_be_another(trained, metric):
    """And stands for itself in the row."""
    found = compare(trained, methods=["ga"], metric=metric, tau=0.9, **UNGUARDED)
    assert found.settings["metric"] == metric
    assert found.utility_share(found.rows[0].calibrated) >= 0.9


def test_without_a_retain_set_and_holdout_the_model_writes_its_own(trained):
    """Nothing but the forget set is needed; a method that needs a retain set says so, and a holdout stands in where there is one."""
    found = compare(trained, methods=["ga", "graddiff"], retain=None, holdout=None, max_steps=1)
    assert found.utility_text == "text sampled from the model"
    assert [r.status for r in found.rows] == ["done", "refused"]
    assert "needs text to keep" in found.rows[1].reason
    assert compare(trained, methods=["ga"], retain=None, max_steps=0).utility_text == "holdout"


def test_an_adapter_is_compared_and_left_as_it_came(trained):
    """Mixed by scaling; its base is not touched. One that does not start from zero is refused before any work."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(trained.fresh(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    before = copy.deepcopy(model.state_dict())
    found = compare(trained, model, methods=["ga"], **{**UNGUARDED, "learning_rate": 3e-2})
    assert found.rows[0].status == "done"
    assert found.utility_share(found.rows[0].calibrated) >= 0.95
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    for n, p in model.named_parameters():
        if "lora_B" in n:
            p.data.fill_(0.1)
    with pytest.raises(ModelError, match="merge it into the weights first"):
        compare(trained, model)


# ---------------------------------------------------------------- failing, stopping, going on


def test_a_method_that_breaks_does_not_lose_the_others(trained, monkeypatch, tmp_path):
    """Its row says how; the next starts from the original weights all the same. When the comparison goes on it is tried again."""
    plain = METHODS["ga"]

    def loss(*given, **options):
        trained.model.lm_head.weight.requires_grad_(False)
        raise RuntimeError("out of\nmemory")

    monkeypatch.setitem(METHODS, "ga", plain._replace(loss=loss))
    found = compare(trained, output_dir=tmp_path / "c")
    assert [r.status for r in found.rows] == ["failed", "done"]
    assert found.rows[0].reason == "RuntimeError: out of memory"
    assert trained.model.lm_head.weight.requires_grad
    assert not found.complete
    monkeypatch.setitem(METHODS, "ga", plain)
    again = compare(trained, output_dir=tmp_path / "c")
    assert [r.status for r in again.rows] == ["done", "done"]
    assert alike(again.rows[1], compare(trained, methods=["simnpo"]).rows[0])


def test_an_interrupted_comparison_goes_on(trained, monkeypatch, tmp_path):
    """What was finished is not done again; the rows are those of an uninterrupted comparison, and the model is as it came."""
    done, real, before = [], trial.unlearn, copy.deepcopy(trained.model.state_dict())

    def unlearn(model, forget, *, method, **options):
        result = real(model, forget, method=method, **options)
        done.append(method)
        if len(done) == 2:
            result.stopped = "interrupted"  # as the loop reports a Ctrl-C
        return result

    monkeypatch.setattr(trial, "unlearn", unlearn)
    with pytest.raises(KeyboardInterrupt):
        compare(trained, output_dir=tmp_path / "c")
    assert [r.method for r in Comparison.read(tmp_path / "c").rows] == ["ga"]
    assert all(torch.equal(before[n], p) for n, p in trained.model.state_dict().items())
    found = compare(trained, output_dir=tmp_path / "c")
    assert done == ["ga", "simnpo", "simnpo"]
    whole = compare(trained)
    assert all(alike(a, b) for a, b in zip(found.rows, whole.rows, strict=True))
    more = compare(trained, methods=["wga"], output_dir=tmp_path / "c")
    assert done[3:] == ["ga", "simnpo", "wga"]
    assert sorted(r.method for r in more.rows) == ["ga", "simnpo", "wga"]


def test_a_folder_of_other_settings_is_refused(trained, tmp_path, monkeypatch):
    """Other options, other texts, another model, or no comparison at all: one sentence, and what is there stays."""
    target = tmp_path / "c"
    compare(trained, methods=["ga"], output_dir=target, max_steps=1)
    there = (target / "result.json").read_bytes()
    other = trained.fresh()
    other.lm_head.weight.data.mul_(1.1)
    for options, message in (
        ({"tau": 0.9}, "was made with tau=0.95, not 0.9"),
        ({"max_steps": 2}, "was made with max_steps=1, not 2"),
        ({"retain": trained.retain[:30]}, "another model or other utility texts"),
        ({"model": other}, "another model or other forget texts"),
        ({"output_dir": tmp_path}, "is not empty"),
    ):
        with pytest.raises(OutputError, match=message):
            compare(trained, **{"methods": ["ga"], "output_dir": target, "max_steps": 1, **options})
    assert (target / "result.json").read_bytes() == there
    (target / "result.json").write_text("{}")
    with pytest.raises(OutputError, match="not what a comparison wrote"):
        compare(trained, methods=["ga"], output_dir=target)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"methods": ["gaa"]}, ArgumentError, 'did you mean "ga"'),
        ({"methods": "ga"}, ArgumentError, "must be a list of names"),
        ({"methods": []}, ArgumentError, "is empty"),
        ({"method_options": {"npo": {"beta": 1}}}, ArgumentError, "not among the methods"),
        ({"method_options": {"ga": {"beta": 1}}}, ArgumentError, "has no option 'beta'"),
        ({"tau": 0}, ArgumentError, "above 0"),
        ({"metric": "accuracy"}, ArgumentError, "choose from"),
        ({"learning_rat": 1}, ArgumentError, 'did you mean "learning_rate"'),
        ({"output_dir": "x", "batch_size": 0}, ArgumentError, "batch_size must be"),
        ({"holdout": ["one text"]}, DataError, "19 reference texts"),
        ({"retain": "no such file.jsonl"}, DataError, "was not found"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_written(trained, tmp_path, monkeypatch, options, error, message):  # fmt: skip
    """One sentence, that names the argument."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        compare(trained, **{"output_dir": "c", **options})
    assert not list(tmp_path.iterdir())


def test_a_utility_of_zero_is_refused(trained):
    """Of which no share can be kept: text that the model does not recite has no extraction strength."""
    with pytest.raises(ArgumentError, match="is 0 under the original model"):
        compare(trained, metric="extraction_strength", retain=["zq xw jv kq"])


# ---------------------------------------------------------------- what is written


def test_what_is_saved_reads_back(found, tmp_path):
    """result.json whole and without a text, a table with a line for each method, two pictures."""
    found.save(tmp_path / "c")
    save_plots(found, tmp_path / "c")
    read = Comparison.read(tmp_path / "c")
    assert read.to_dict() == found.to_dict()
    assert read.rows == found.rows
    written = (tmp_path / "c" / "result.json").read_text()
    assert "secret" not in written
    assert not any(text[:12] in written for text in tiny.sentences(2, 3))
    with (tmp_path / "c" / "table.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["method"] for line in lines] == ["original", "ga", "idk", "simnpo"]
    assert float(lines[1]["exposure"]) == found.rows[0].calibrated.exposure.estimate
    assert float(lines[1]["utility_share"]) >= TAU > float(lines[1]["utility_share_uncalibrated"])
    assert lines[2]["exposure"] == ""
    assert lines[2]["reason"] == found.rows[1].reason
    assert (tmp_path / "c" / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [
        "comparison.png", "comparison.svg", "result.json", "table.csv",
    ]  # fmt: skip


def test_the_plot_names_each_method_and_the_original(found):
    """The refused one is not drawn. The same comparison gives the same file."""
    svg = comparison_plot(found, "svg").decode()
    for name in ("original", "ga", "simnpo", "unseen text"):
        assert f">{name}</text>" in svg
    assert ">idk</text>" not in svg
    assert comparison_plot(found, "svg").decode() == svg
    with pytest.raises(ArgumentError, match='"svg" or "png"'):
        comparison_plot(found, "gif")


def test_names_in_the_plot_stand_apart():
    """In their order, `gap` apart, within the limits; untouched where there is room."""
    assert _spread([0.0, 1.0, 2.0], 0.5, -1, 3) == [0.0, 1.0, 2.0]
    close = _spread([0.1, 0.1, 0.2, 2.9, 3.0], 0.5, 0, 3)
    assert close == pytest.approx([0.1, 0.6, 1.1, 2.5, 3.0])


def test_the_table_fits_80_columns_or_shows_all(found):
    """Narrow, with every cell whole; wide, with the rest. The refused method's reason stands below."""
    from rich.console import Console

    for wide, width in ((False, 80), (True, 120)):
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(comparison_table(found, wide=wide))
        text = console.export_text()
        assert "…" not in text
        assert "has no prompt that could be refused" in " ".join(text.split())
        assert ("peak" in text) == wide
        assert f"{found.rows[0].calibrated.exposure.estimate:.2f}" in text


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    """A saved model, and the texts as files beside it."""
    folder = tmp_path_factory.mktemp("saved")
    for part in (trained.model, trained.tokenizer):
        part.save_pretrained(folder / "model-1.5")
    for role in ("forget", "retain", "holdout"):
        (folder / f"{role}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in getattr(trained, role)))
    return folder


def test_the_command_compares_prints_and_writes(call, folder, tmp_path):
    """Exit code 0, the table, the files; run again it goes on at once; with a method that is refused, 1; other settings, 2."""
    arguments = [
        "compare",
        folder / "model-1.5",
        "--learning-rate",
        1e-3,
        "--max-steps",
        4,
        "--set",
        "GA.temperature=1.5",
    ]
    for role in ("forget", "retain", "holdout"):
        arguments += [f"--{role}", folder / f"{role}.jsonl"]
    code, out, err = call(*arguments, "--methods", "ga, simnpo")
    assert (code, err) == (0, "")
    assert "simnpo" in out
    assert "comparison.svg and comparison.png are in model-1.5-compare" in out
    assert json.loads((tmp_path / "model-1.5-compare" / "result.json").read_text())["complete"]
    code, out, _ = call(*arguments, "--methods", "ga,idk", "--json", "--quiet")
    assert code == 1
    assert [r["method"] for r in json.loads(out)["rows"]] == ["ga", "idk", "simnpo"]
    assert json.loads(out)["settings"]["method_options"] == {"ga": {"temperature": 1.5}}
    for wrong, message in (("temperature=1.5", "is set as METHOD.name=value"), ("ga.beta=1", "has no option 'beta'")):
        code, out, err = call(*arguments, "--methods", "ga", "--set", wrong)
        assert (code, out) == (2, "")
        assert message in err
    code, out, err = call(*arguments, "--methods", "ga", "--tau", 0.9)
    assert (code, out) == (2, "")
    assert err.startswith("pyunlearn: the comparison in ")
    assert err.count("\n") == 1


def test_the_command_that_is_interrupted_says_how_to_go_on(call, folder, tmp_path, monkeypatch):
    """Exit code 130."""

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(trial, "unlearn", interrupt)
    code, out, err = call(
        "compare", folder / "model-1.5", "--forget", folder / "forget.jsonl", "--holdout", folder / "holdout.jsonl", "--out", "c"
    )  # fmt: skip
    assert (code, out) == (130, "")
    assert "run the same command again" in err
    assert not list(tmp_path.iterdir())
