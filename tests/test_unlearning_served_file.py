"""Runs for a GGUF file: what is unlearned stays unlearned in its 4 bits, or the verdict says that it does not."""

import copy
import json

import gguf_files
import pytest
import tiny
import torch
from unlearning_runs import Interrupted, run, same, timeless, weights

import pyunlearn
from pyunlearn import models
from pyunlearn.errors import ArgumentError, ModelError
from pyunlearn.methods import METHODS
from pyunlearn.models.gguf_layout import formats_of, read_like
from pyunlearn.models.gguf_rounding import rounded_as
from pyunlearn.unlearning.config import UnlearnConfig
from pyunlearn.unlearning.optimizer import TrainedWeights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def served(story, tmp_path_factory):
    """The file of the model that knows two secrets, in Q4_1."""
    return gguf_files.write(tmp_path_factory.mktemp("served") / "served.gguf", story.model, story.tokenizer, "Q4_1")


@pytest.fixture(scope="module")
def on_grid(story, served):
    """The model as it is in that file: each weight is one of the 16 numbers of its block."""
    return models.load(served, tokenizer=story.tokenizer)[0].eval()


def unlearned(story, model, **options):
    """The result of a run with the defaults on a copy of a model."""
    options = {"retain": story.retain, "holdout": story.holdout, "progress": False} | options
    return pyunlearn.unlearn(copy.deepcopy(model), story.forget, tokenizer=story.tokenizer, **options)


def audited(story, path, original):
    """The verdicts of an audit of a GGUF file."""
    options = {"holdout": story.holdout, "original": original, "metrics": [], "progress": False}
    audit = pyunlearn.audit(path, story.forget, tokenizer=story.tokenizer, **options)
    return [e.verdict for e in audit.examples]


@pytest.mark.full
@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_unlearned_is_unlearned_in_the_file(story, on_grid, served, tmp_path, seed):
    """Without `gguf_like` both texts are back in the file; with it none, in about as many steps, for as much utility.

    The audit of the file is another program's reading of it: transformers reads the weights.
    """
    plain = unlearned(story, on_grid, seed=seed)
    assert plain.forgotten
    assert plain.notes[-1].startswith(
        "The model was read from served.gguf, with 16 tensors in few bits: rounded so again"
    )
    plain.save_gguf(tmp_path / "plain.gguf", like=served)
    assert audited(story, tmp_path / "plain.gguf", on_grid) == ["still exposed"] * 2

    result = unlearned(story, on_grid, seed=seed, gguf_like=served)
    assert result.forgotten
    assert result.utility.interval[1] <= result.utility.budget
    assert len(result.history) <= 2 * len(plain.history)
    assert result.settings["gguf_like"] == str(served)
    report = result.save_gguf(tmp_path / "new.gguf")
    assert report.rounding == 0
    assert report.formats == {"Q4_1": 16, "F32": 5}
    assert audited(story, tmp_path / "new.gguf", on_grid) == ["forgotten"] * 2
    there, _ = models.load(tmp_path / "new.gguf", tokenizer=story.tokenizer)
    assert same(there, result.model)


@pytest.mark.full
def test_weights_that_are_on_no_grid_are_measured_rounded(story, on_grid, served):
    """Of the model before it was rounded, all numbers are those of the file that is served, the first ones too."""
    before = weights(story.model)
    result = unlearned(story, story.model, gguf_like=served)
    assert same(story.model, before)
    assert result.forgotten
    assert result.utility.nll_before == unlearned(story, on_grid, max_steps=0).utility.nll_before
    assert_rounded(result.model, served)


def assert_rounded(model, served, at_least=None):
    """Assert that each weight of a model is one that the file holds."""
    formats = formats_of(read_like(served), model, served, at_least)
    assert len(formats) == 21
    assert all(torch.equal(p, rounded_as(p, name)) for p, name in formats.items())


@pytest.mark.parametrize("at_least", [None, "Q5_0", "Q8_0", "F16"])
def test_each_step_ends_on_the_grid(story, on_grid, served, at_least):
    """In the larger formats too; the weights have moved."""
    result = unlearned(story, on_grid, gguf_like=served, gguf_at_least=at_least, max_steps=2, learning_rate=1e-3)
    assert_rounded(result.model, served, at_least)
    assert not same(result.model, on_grid)


def test_small_steps_add_up(served, on_grid):
    """Steps of a hundredth of a grid step move as many weights as one that is as long as all of them."""

    def moved(steps, rate):
        model = copy.deepcopy(on_grid)
        formats = formats_of(read_like(served), model, served)
        weights = TrainedWeights(model, rate, formats={p: f for p, f in formats.items() if f != "F32"}, seed=0)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        for _ in range(steps):
            weights.optimizer.step()
        pairs = zip(model.parameters(), on_grid.parameters(), strict=True)
        return torch.cat([(p - q).detach().flatten() for p, q in pairs if p.ndim > 1]).mean().item()

    few, many = moved(1, 1e-3), moved(10, 1e-4)
    assert few == pytest.approx(-1e-3, rel=0.05)
    assert many == pytest.approx(few, rel=0.01)


@pytest.mark.full
def test_a_run_that_is_too_short_says_what_helps(story, on_grid, served, tmp_path):
    """One sentence, where a text is exposed in few bits; not in 8 bits, in which its file is then written."""
    measured = "The numbers after the run are those of weights that are rounded as in a GGUF file ({})."
    helps = (
        '16 of 16 have Q4_1, in which a small change can be lost: gguf_at_least="Q8_0" (--gguf-at-least Q8_0) has '
        "finer steps."
    )
    short = unlearned(story, on_grid, gguf_like=served, max_steps=1)
    assert not short.passed
    assert short.notes[-2:] == [measured.format("16 Q4_1"), helps]
    larger = unlearned(story, on_grid, gguf_like=served, gguf_at_least="Q8_0", max_steps=1)
    assert larger.notes[-1] == measured.format("16 Q8_0")
    assert larger.save_gguf(tmp_path / "new.gguf", like=served).formats == {"Q8_0": 16, "F32": 5}
    assert unlearned(story, on_grid, gguf_like=served).notes[-1] == measured.format("16 Q4_1")
    assert not any("served.gguf" in note for note in unlearned(story, on_grid, max_steps=0).notes)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_steps_of_no_size_change_nothing_in_16_bits(story, served, dtype):
    """The unrounded numbers are rounded to the weights in their dtype; a merged adapter that is untrained likewise."""
    model = story.fresh().to(dtype)
    plain = unlearned(story, model, gguf_like=served, max_steps=0)
    still = unlearned(story, model, gguf_like=served, max_steps=1, learning_rate=1e-12)
    assert still.history
    assert same(still.model, plain.model)
    pytest.importorskip("peft")
    assert same(unlearned(story, model, gguf_like=served, max_steps=0, lora=2, merge=True).model, plain.model)


def test_one_weight_in_two_formats_is_refused(tmp_path, story):
    """Of a file that holds the head apart from the embeddings, and a model that has one weight for both."""
    apart, tied = (gguf_files.model_of("llama", tied=tied) for tied in (False, True))
    path = gguf_files.write(tmp_path / "apart.gguf", apart, story.tokenizer, "Q4_1")
    reader = read_like(path)
    assert len(set(formats_of(reader, tied, path, "Q8_0").values())) == 2
    at = next(i for i, t in enumerate(reader.tensors) if t.name == "output.weight")
    reader.tensors[at] = reader.tensors[at]._replace(tensor_type=gguf_files.KINDS["Q8_0"])
    with pytest.raises(ModelError, match=r"holds embeddings and head apart, in (Q4_1 and Q8_0|Q8_0 and Q4_1)"):
        formats_of(reader, tied, path)


@pytest.mark.full
def test_an_interrupted_run_resumes(story, on_grid, served, tmp_path):
    """The unrounded numbers are in the checkpoint: history and weights are those of an uninterrupted run."""
    options = {"gguf_like": served, "max_steps": 6, "method": "ga", "learning_rate": 3e-4}
    whole = run(story, model=copy.deepcopy(on_grid), **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "ga", tiny.with_loss("ga", Interrupted("ga", 4)))
        first = run(story, model=copy.deepcopy(on_grid), output_dir=tmp_path / "out", checkpoint_every=1e-9, **options)
    assert first.stopped == "interrupted"
    again = run(story, model=copy.deepcopy(on_grid), output_dir=tmp_path / "out", resume=True, **options)
    assert timeless(again.history) == timeless(whole.history)
    assert same(again.model, whole.model)


@pytest.mark.full
def test_an_adapter_is_measured_after_it_is_merged_and_rounded(story, on_grid, served, tmp_path):
    """The verdicts are the file's, also where rounding has undone its changes."""
    pytest.importorskip("peft")
    result = unlearned(story, on_grid, gguf_like=served, lora=8, merge=True)
    assert_rounded(result.model, served)
    assert result.save_gguf(tmp_path / "new.gguf").rounding == 0
    exposed = [v == "still exposed" for v in audited(story, tmp_path / "new.gguf", on_grid)]
    assert exposed == [e.verdict == "still exposed" for e in result.examples]
    assert result.stopped in ("forgotten", "undone by the merge")


@pytest.mark.full
def test_it_goes_with_robust(story, on_grid, served):
    """Probes fine-tune rounded weights, and leave them on the grid."""
    result = unlearned(story, on_grid, gguf_like=served, robust=True, max_steps=60)
    assert_rounded(result.model, served)
    assert result.history[-1]["accepted"] is not None


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"gguf_like": "no.gguf"}, ModelError, "the GGUF file no.gguf was not found"),
        ({"gguf_like": 3}, ArgumentError, "gguf_like must be the path of a GGUF file, got 3"),
        ({"gguf_at_least": "Q8_0"}, ArgumentError, "gguf_at_least .* is an option of gguf_like .*: give that too"),
        ({"gguf_like": "served", "gguf_at_least": "Q9"}, ArgumentError, "gguf_at_least must be one of Q4_0, .*'Q9'"),
        ({"gguf_like": "served", "mask": "saliency"}, ArgumentError, "mask leaves the bits .* leave one out"),
        ({"gguf_like": "other"}, ModelError, "is of another model: its block_count is 3 and not 2"),
    ],
)
def test_what_cannot_be_is_refused_before_the_model_changes(options, error, match, story, served, tmp_path):
    """One sentence."""
    model, before = story.fresh(), weights(story.model)
    if options.get("gguf_like") == "served":
        options = options | {"gguf_like": served}
    if options.get("gguf_like") == "other":
        other = gguf_files.model_of("llama", num_hidden_layers=3)
        options = options | {"gguf_like": gguf_files.write(tmp_path / "other.gguf", other, story.tokenizer)}
    with pytest.raises(error, match=match) as caught:
        run(story, model=model, **options)
    assert "\n" not in str(caught.value)
    assert same(model, before)


@pytest.mark.full
def test_an_adapter_that_is_not_merged_is_refused(story, served):
    """A GGUF file has no adapter."""
    pytest.importorskip("peft")
    with pytest.raises(ArgumentError, match="has an adapter, and a GGUF file holds the weights without it: merge it"):
        run(story, model=story.fresh(), gguf_like=served, lora=2)


def test_the_path_is_a_setting_that_a_result_can_give(served, tmp_path):
    """As text, as JSON has it."""
    made = UnlearnConfig(gguf_like=served, gguf_at_least="Q8_0")
    result = tmp_path / "result.json"
    result.write_text(json.dumps({"settings": made.to_dict()}))
    again = UnlearnConfig.read(result)
    assert (again.gguf_like, again.gguf_at_least) == (str(served), "Q8_0")
