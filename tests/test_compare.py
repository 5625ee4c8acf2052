"""Methods at equal utility: the rows, the texts behind them, resuming, and the files."""

import copy
import csv
import io
import math
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from rich.console import Console

import pyunlearn
from pyunlearn.comparing import (
    UTILITY_METRICS,
    CompareConfig,
    Comparison,
    comparison_plot,
    comparison_table,
    measurement,
    trial,
)
from pyunlearn.comparing.measurement import METRICS
from pyunlearn.comparing.plots import _spread, save_plots
from pyunlearn.data import encode, read_examples
from pyunlearn.errors import ArgumentError, ModelError, OutputError
from pyunlearn.methods import METHODS
from pyunlearn.metrics import generalized_exposure
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.probes import teacher_forced
from pyunlearn.probes.non_members import non_members_of_holdout

OPTIONS = {"learning_rate": 1e-3, "max_steps": 4, "seed": 0}
TAU = 0.98
UNGUARDED = {"retain_loss": None, "utility_budget": 5.0, "learning_rate": 1e-2, "max_steps": 12}
"""Settings with which a method costs more than TAU allows."""


@pytest.fixture(scope="module")
def trained(one_thread):
    return tiny.trained(tiny.tiny_llama, tiny.sentences, count=200, repeats=8, epochs=6)


def compare(trained, model=None, **options):
    return pyunlearn.compare(
        trained.model if model is None else model,
        options.pop("forget", trained.forget),
        tokenizer=trained.tokenizer,
        **{"methods": ["ga", "simnpo"], "retain": trained.retain, "holdout": trained.holdout, **OPTIONS, **options},
    )


@pytest.fixture(scope="module")
def run(trained):
    """(comparison, True if every weight was unchanged, training mode after it); one of the methods needs prompts."""
    before = copy.deepcopy(trained.model.state_dict())
    trained.model.train()
    made = compare(trained, methods=["ga", "idk", "SimNPO", "ga"], tau=TAU, **UNGUARDED)
    unchanged = all(torch.equal(before[n], p) for n, p in trained.model.state_dict().items())
    training = trained.model.training
    trained.model.eval()
    return made, unchanged, training


@pytest.fixture
def comparison(run):
    return run[0]


def shown(comparison, *, wide=False, width=80):
    """The table as text."""
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(comparison_table(comparison, wide=wide))
    return console.export_text()


def alike(a, b):
    """Two rows, but for time and memory."""
    one, other = ({k: v for k, v in vars(r).items() if k not in ("seconds", "peak_memory")} for r in (a, b))
    return one == other


# ---------------------------------------------------------------- the rows


def test_there_is_a_row_for_each_method_and_the_model_is_unchanged(run):
    """In the order of `methods`, once each; one that needs prompts and has none is refused with its reason."""
    comparison, unchanged, training = run
    assert [(r.method, r.status) for r in comparison.rows] == [("ga", "done"), ("idk", "refused"), ("simnpo", "done")]
    assert "has no prompt that could be refused" in comparison.rows[1].reason
    assert not comparison.complete
    assert unchanged
    assert training


def test_each_method_is_what_unlearn_gives_from_the_same_start(comparison, trained):
    """The uncalibrated numbers are those of a run by itself, though another method ran before it in the same model."""
    row = comparison.rows[2]
    alone = pyunlearn.unlearn(
        trained.fresh(),
        trained.forget,
        retain=trained.retain,
        holdout=trained.holdout,
        tokenizer=trained.tokenizer,
        method="simnpo",
        **{**OPTIONS, **UNGUARDED},
    )
    assert row.uncalibrated.exposures == pytest.approx([e.exposure_after for e in alone.examples], abs=1e-6)
    assert row.uncalibrated.forget_nll.estimate == pytest.approx(
        -sum(e.log_likelihood_after for e in alone.examples) / 2, abs=1e-4
    )
    assert {v for v, n in row.uncalibrated.verdicts.items() if n} == {e.verdict for e in alone.examples}
    assert (row.steps, row.stopped) == (len(alone.history), alone.stopped)


def test_methods_are_measured_at_equal_utility(comparison, trained):
    """A method that costs more than tau allows is mixed to just above tau, and then forgets less."""
    assert all(row.weight < 1 for row in comparison.rows if row.done)
    for row in (r for r in comparison.rows if r.done):
        assert comparison.utility_share(row.uncalibrated) < TAU
        assert TAU <= comparison.utility_share(row.calibrated) < TAU + 0.005
        assert row.calibrated.exposure.estimate > row.uncalibrated.exposure.estimate
        assert row.seconds > 0
    tokens = encode(read_examples(trained.retain, role="retain"), trained.tokenizer, role="retain", max_length=None)
    forced = teacher_forced(trained.model, tokens)
    assert comparison.original.utility == pytest.approx(sum(map(math.exp, forced.mean_log_likelihood)) / 60, abs=1e-6)
    assert comparison.utility_text == "retain set"
    assert comparison.non_members == 60
    assert comparison.original.verdicts["still exposed"] == 2
    assert (
        comparison.original.exposure.low <= comparison.original.exposure.estimate <= comparison.original.exposure.high
    )


def test_a_method_above_tau_is_named(trained, comparison):
    """Mixing cannot lower its utility: it is marked, and the title no longer says "at 98%". The others are not."""
    assert all(row.equalized for row in comparison.rows if row.done)
    assert f"bits at {TAU:.0%} of the original's" in shown(comparison)
    above = compare(trained, methods=["ga"], max_steps=0)
    assert (above.rows[0].weight, above.rows[0].equalized, above.equalized) == (1.0, False, False)
    text = shown(above)
    assert "bits at 95% or more of the original's" in text
    assert "1.00+" in text
    assert "+ not at equal utility" in text


def test_what_the_holdout_has_lost_is_shown(comparison, trained):
    """A column has its probability per token, as a share of the original's: no method has trained on it."""
    for row in (row for row in comparison.rows if row.done):
        share = math.exp(comparison.original.non_members_nll - row.calibrated.non_members_nll)
        assert 0.5 < share != 1
        assert f" {share:.1%} " in shown(comparison, wide=True, width=120)
    alone = compare(trained, methods=["ga"], max_steps=0, retain=None)
    assert "hold-" in shown(comparison, wide=True, width=120)
    assert "hold-" not in shown(alone, wide=True, width=120)


def test_the_run_s_own_memory_is_measured(comparison):
    """The peak memory of a run, where the system reports it, is more than nothing and less than the machine's."""
    for row in (r for r in comparison.rows if r.done):
        assert row.peak_memory is None or 2**20 < row.peak_memory < 2**40


def test_every_metric_has_a_function():
    """The names in the configuration are those that the criterion can compute."""
    assert tuple(METRICS) == UTILITY_METRICS


@pytest.mark.full
@pytest.mark.parametrize("metric", UTILITY_METRICS[1:])
def test_utility_can_be_another_metric(trained, metric):
    """Each of UTILITY_METRICS can be made equal."""
    comparison = compare(trained, methods=["ga"], metric=metric, tau=0.9, **UNGUARDED)
    assert comparison.settings["metric"] == metric
    assert comparison.utility_share(comparison.rows[0].calibrated) >= 0.9


def test_without_a_retain_set_and_holdout_the_model_writes_its_own(trained):
    """Only the forget set is needed; a method that needs a retain set says so; a holdout replaces the samples."""
    comparison = compare(trained, methods=["ga", "graddiff"], retain=None, holdout=None, max_steps=1)
    assert comparison.utility_text == "text sampled from the model"
    assert [r.status for r in comparison.rows] == ["done", "refused"]
    assert "needs text to keep" in comparison.rows[1].reason
    assert compare(trained, methods=["ga"], retain=None, max_steps=0).utility_text == "holdout"


def test_text_that_the_model_wrote_shows_no_text_as_forgotten(trained, comparison):
    """The column has the name of the verdict "no likelier", and a note says so, as that of `unlearn`."""
    weak = compare(trained, methods=["ga"], retain=None, holdout=None, max_steps=0)
    assert weak.evidence == "self-sampled"
    assert any("not whether it is forgotten" in note for note in weak.notes)
    verdicts = dict.fromkeys(weak.original.verdicts, 0) | {"no likelier": 2}
    weak.rows[0] = replace(weak.rows[0], calibrated=replace(weak.original, verdicts=verdicts))
    text, other = (shown(c) for c in (weak, comparison))
    assert "no like-" in text
    assert "for-" not in text
    assert comparison.evidence == "holdout"
    assert "no like-" not in other
    assert not comparison.notes


def test_a_text_that_is_still_recited_is_exposed(trained, monkeypatch):
    """Likelihood and first choices are those of non-members, but the model continues its beginning with its rest."""
    options = {"methods": ["ga"], "utility_budget": 5.0, "max_steps": 20}
    forgotten = compare(trained, **options).rows[0].uncalibrated.verdicts["forgotten"]
    assert forgotten
    monkeypatch.setattr(measurement, "recitations", lambda lm, examples, *_: np.ones(len(examples), dtype=bool))
    again = compare(trained, **options).rows[0].uncalibrated.verdicts
    assert (again["forgotten"], again["still exposed"]) == (0, 2)


def test_non_members_that_became_likelier_are_compared_as_they_are(trained):
    """As the stopping rule does: a model that knew them less well before would else make every text look exposed."""
    model, texts = trained.fresh(), {"forget": trained.retain[:10], "holdout": trained.holdout}
    examples = {role: read_examples(rows, role=role) for role, rows in texts.items()}
    tokens = {r: encode(rows, trained.tokenizer, role=r, max_length=None) for r, rows in examples.items()}
    model.lm_head.weight.data.mul_(0.5)
    criterion = measurement.Criterion(
        LanguageModel.of(model, trained.tokenizer),
        examples=examples["forget"],
        forget=tokens["forget"],
        utility=tokens["holdout"],
        non_members=non_members_of_holdout(10, tokens["holdout"]),
        config=CompareConfig(),
    )
    model.lm_head.weight.data.mul_(2)
    scores = (-teacher_forced(trained.model, tokens[role]).mean_log_likelihood for role in texts)
    assert criterion.measure().exposures == pytest.approx(generalized_exposure(*scores).lower.tolist())


@pytest.mark.full
def test_an_adapter_is_compared_and_left_as_it_came(trained):
    """Adapters are mixed by scaling and the base stays; one that does not start from zero is refused at once."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(trained.fresh(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    before = copy.deepcopy(model.state_dict())
    comparison = compare(trained, model, methods=["ga"], **{**UNGUARDED, "learning_rate": 3e-2})
    assert comparison.rows[0].status == "done"
    assert comparison.utility_share(comparison.rows[0].calibrated) >= 0.95
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    for n, p in model.named_parameters():
        if "lora_B" in n:
            p.data.fill_(0.1)
    with pytest.raises(ModelError, match="merge it into the weights first"):
        compare(trained, model)


# ---------------------------------------------------------------- failing, stopping, resuming


@pytest.mark.full
def test_a_method_that_breaks_does_not_lose_the_others(trained, monkeypatch, tmp_path):
    """Its row says how; the next starts from the original weights. A resumed comparison tries it again."""
    plain = METHODS["ga"]

    def loss(*given, **options):
        trained.model.lm_head.weight.requires_grad_(False)
        raise RuntimeError("out of\nmemory")

    monkeypatch.setitem(METHODS, "ga", tiny.with_loss("ga", loss))
    comparison = compare(trained, output_dir=tmp_path / "c")
    assert [r.status for r in comparison.rows] == ["failed", "done"]
    assert comparison.rows[0].reason == "RuntimeError: out of memory"
    assert trained.model.lm_head.weight.requires_grad
    assert not comparison.complete
    monkeypatch.setitem(METHODS, "ga", plain)
    again = compare(trained, output_dir=tmp_path / "c")
    assert [r.status for r in again.rows] == ["done", "done"]
    assert alike(again.rows[1], compare(trained, methods=["simnpo"]).rows[0])


def test_an_interrupted_comparison_resumes(trained, monkeypatch, tmp_path):
    """Finished rows are not repeated; the result is that of an uninterrupted comparison, and the model is unchanged."""
    done, real, before = [], trial.run_unlearn, copy.deepcopy(trained.model.state_dict())

    def run_unlearn(model, config, inputs):
        result = real(model, config, inputs)
        done.append(config.method)
        if len(done) == 2:
            result.stopped = "interrupted"  # as the loop reports a Ctrl-C
        return result

    monkeypatch.setattr(trial, "run_unlearn", run_unlearn)
    with pytest.raises(KeyboardInterrupt):
        compare(trained, output_dir=tmp_path / "c")
    assert [r.method for r in Comparison.read(tmp_path / "c").rows] == ["ga"]
    assert all(torch.equal(before[n], p) for n, p in trained.model.state_dict().items())
    resumed = compare(trained, output_dir=tmp_path / "c")
    assert done == ["ga", "simnpo", "simnpo"]
    whole = compare(trained)
    assert all(alike(a, b) for a, b in zip(resumed.rows, whole.rows, strict=True))
    more = compare(trained, methods=["wga"], output_dir=tmp_path / "c")
    assert done[3:] == ["ga", "simnpo", "wga"]
    assert sorted(r.method for r in more.rows) == ["ga", "simnpo", "wga"]


def test_a_folder_of_other_settings_is_refused(trained, tmp_path, monkeypatch):
    """Other settings, other texts, another model, or no comparison at all: one sentence, and the files stay."""
    target = tmp_path / "c"
    compare(trained, methods=["ga"], output_dir=target, max_steps=1)
    before = (target / "result.json").read_bytes()
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
    assert (target / "result.json").read_bytes() == before
    (target / "result.json").write_text("{}")
    with pytest.raises(OutputError, match="not what a comparison wrote"):
        compare(trained, methods=["ga"], output_dir=target)


def test_a_utility_of_zero_is_refused(trained):
    """No share of it can be retained: text that the model does not recite has no extraction strength."""
    with pytest.raises(ArgumentError, match="is 0 under the original model"):
        compare(trained, metric="extraction_strength", retain=["zq xw jv kq"])


# ---------------------------------------------------------------- files


def test_a_saved_comparison_reads_back(comparison, tmp_path):
    """result.json is whole and holds no text; a table has a line for each method; two pictures are written."""
    comparison.save(tmp_path / "c")
    save_plots(comparison, tmp_path / "c")
    read = Comparison.read(tmp_path / "c")
    assert read.to_dict() == comparison.to_dict()
    assert read.rows == comparison.rows
    written = (tmp_path / "c" / "result.json").read_text()
    assert "secret" not in written
    assert not any(text[:12] in written for text in tiny.sentences(2, 3))
    with (tmp_path / "c" / "table.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["method"] for line in lines] == ["original", "ga", "idk", "simnpo"]
    assert float(lines[1]["exposure"]) == comparison.rows[0].calibrated.exposure.estimate
    assert float(lines[1]["utility_share"]) >= TAU > float(lines[1]["utility_share_uncalibrated"])
    assert lines[2]["exposure"] == ""
    assert lines[2]["reason"] == comparison.rows[1].reason
    assert (tmp_path / "c" / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    names = ["comparison.png", "comparison.svg", "result.json", "table.csv"]
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == names


def test_result_json_is_a_config(comparison, tmp_path):
    """The settings of a saved comparison start the same comparison."""
    comparison.write(tmp_path)
    made = CompareConfig.read(tmp_path / "result.json")
    assert made == CompareConfig(methods=["ga", "idk", "simnpo"], tau=TAU, **{**OPTIONS, **UNGUARDED})


def test_the_plot_names_each_method_and_the_original(comparison):
    """The refused one is not drawn. The same comparison gives the same file."""
    svg = comparison_plot(comparison, "svg").decode()
    for name in ("original", "ga", "simnpo", "unseen text"):
        assert f">{name}</text>" in svg
    assert ">idk</text>" not in svg
    assert comparison_plot(comparison, "svg").decode() == svg
    with pytest.raises(ArgumentError, match='"svg" or "png"'):
        comparison_plot(comparison, "gif")


def test_names_in_the_plot_stand_apart():
    """Names keep their order, at least `gap` apart and within the limits, and do not move where they are far apart."""
    assert _spread([0.0, 1.0, 2.0], 0.5, -1, 3) == [0.0, 1.0, 2.0]
    close = _spread([0.1, 0.1, 0.2, 2.9, 3.0], 0.5, 0, 3)
    assert close == pytest.approx([0.1, 0.6, 1.1, 2.5, 3.0])


def test_the_table_fits_80_columns_or_shows_all(comparison):
    """Narrow or wide, every cell is whole. The refused method's reason stands below."""
    for wide, width in ((False, 80), (True, 120)):
        text = shown(comparison, wide=wide, width=width)
        assert "…" not in text
        assert "has no prompt that could be refused" in " ".join(text.split())
        assert ("peak" in text) == wide
        assert f"{comparison.rows[0].calibrated.exposure.estimate:.2f}" in text
