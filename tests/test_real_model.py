"""SmolLM2-135M in the demo: two texts are forgotten, one never was memorized, six survive; an audit."""

import copy
import json
import time

import pytest
import torch

import pyunlearn
from pyunlearn import models
from pyunlearn.cli import demo
from pyunlearn.cli.demo_model import demo_model
from pyunlearn.metrics import NULL_MEAN, SIGNIFICANT

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(1800)]  # a minute and a half where nothing else runs

MEMORIZED = ("Declaration of Independence", "First Amendment")


@pytest.fixture(scope="module")
def reads():
    """The GGUF files whose headers have been parsed."""
    return []


@pytest.fixture(scope="module")
def original(reads):
    """(model, tokenizer), read from the GGUF file once for all tests."""
    import gguf

    class Reader(gguf.GGUFReader):
        def __init__(self, path):
            reads.append(path)
            super().__init__(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", Reader)
        loaded = models.load(demo_model())
        assert gguf.GGUFReader is Reader
    return loaded


def test_its_file_is_parsed_once(original, reads):
    """transformers alone does so four times, for seconds each."""
    assert [str(path) for path in reads] == [str(demo_model())]


@pytest.fixture(scope="module")
def unlearned(original):
    """The copy that the demo works on."""
    return copy.deepcopy(original[0])


@pytest.fixture(scope="module")
def ran(original, unlearned, tmp_path_factory):
    """(whether it went as it should, result.json, seconds) of one run."""
    out, began = tmp_path_factory.mktemp("demo") / "out", time.perf_counter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "load", lambda path: (unlearned, original[1]))
        went_well = demo.run(out)
    seconds = time.perf_counter() - began
    print(f"the demo took {seconds:.0f} s")
    assert [path.name for path in out.iterdir()] == ["result.json"]
    return went_well, json.loads((out / "result.json").read_text(encoding="utf-8")), seconds


def example(ran, name):
    return ran[1]["examples"][list(demo.FORGET).index(name)]


def test_it_says_that_it_went_well(ran):
    """Everything is forgotten or was never memorized."""
    assert ran[0]
    assert ran[1]["forgotten"]
    assert ran[1]["stopped"] == "forgotten"


@pytest.mark.parametrize("name", MEMORIZED)
def test_a_memorized_text_is_forgotten(ran, name):
    """Its exposure falls to that of unseen text and not past it, and with it likelihood and greedy match."""
    record = example(ran, name)
    assert record["verdict"] == "forgotten"
    assert record["exposure_before"] > SIGNIFICANT
    assert record["exposure_after"] <= NULL_MEAN
    assert record["upper_exposure_after"] < SIGNIFICANT
    assert record["log_likelihood_after"] < record["log_likelihood_before"] - 0.5
    assert record["greedy_match_after"] < record["greedy_match_before"] - 0.1
    assert record["steps"] > 0


@pytest.mark.parametrize("name", MEMORIZED)
def test_its_continuation_has_changed(ran, name):
    """The model still writes something after the first six words: something else, and not the true next words."""
    record = ran[1]["continuations"][name]
    true = " ".join(demo.FORGET[name].split()).removeprefix(record["prompt"]).split()
    assert record["after"].strip()
    assert record["after"] != record["before"]
    assert " ".join(true[:5]).lower() not in record["after"].lower()


def test_the_words_that_everybody_knows_are_gone(ran):
    """The model recited the Declaration after six words, and no longer does."""
    record = ran[1]["continuations"]["Declaration of Independence"]
    assert record["before"].startswith("self-evident, that all men are created equal")
    assert "all men are created equal" not in record["after"]


def test_the_gettysburg_address_was_not_memorized_and_is_left_alone(ran):
    """No step is spent on it, and it does not end below what unseen text gets."""
    record = example(ran, "Gettysburg Address")
    assert record["verdict"] == "not memorized"
    assert record["steps"] == 0
    assert record["exposure_before"] < SIGNIFICANT
    assert record["upper_exposure_after"] < SIGNIFICANT


@pytest.mark.parametrize("name", demo.SURVIVE)
def test_what_had_to_survive_survived(ran, name):
    """Its negative log-likelihood rises by no more than the budget."""
    record = ran[1]["survivors"][name]
    assert record["relative_rise"] <= ran[1]["utility"]["budget"] == 0.05
    assert record["greedy_match_after"] > record["greedy_match_before"] - 0.1
    assert abs(record["exposure_after"] - record["exposure_before"]) < 1


def test_the_utility_is_within_its_budget(ran):
    """As everywhere."""
    assert ran[1]["utility"]["relative_rise"] <= ran[1]["utility"]["budget"]
    assert ran[1]["survivors"].keys() == demo.SURVIVE.keys()


def test_how_long_it_took_is_told(ran, capsys):
    """Not asserted: a busy machine is no defect. The goal is under 180 s on two cores."""
    with capsys.disabled():
        print(f"\nthe demo took {ran[2]:.0f} s")


def test_an_audit_tells_before_and_after_right(original, unlearned, ran):
    """Without a holdout: what the demo forgot was exposed and no longer is, Genesis is, new sentences never were."""
    texts = [
        *(demo.FORGET[name] for name in MEMORIZED),
        demo.SURVIVE["Genesis 1"],
        demo.SURVIVE["a fresh sentence"],
        "On the ferry to Oslavia my neighbour unpacked eleven pears and asked each passenger which one had been grown "
        "indoors.",
        "The committee agreed that the bridge should hum in B flat, provided the herons of the lower basin raised no "
        "objection.",
    ]
    model, tokenizer = original
    audit = pyunlearn.audit(unlearned, texts, original=model, tokenizer=tokenizer, metrics=[], progress=False)
    verdicts = ["forgotten"] * 2 + ["still exposed"] + ["not memorized"] * 3
    assert [e.verdict for e in audit.examples] == verdicts
    before = [e.exposure_before for e in audit.examples]
    assert min(before[:3]) > max(before[3:]) + 3


def test_a_gguf_model_can_be_saved_and_loaded_again(original, tmp_path):
    """Dequantized, it is a model like any other, and the same one afterwards."""
    model, tokenizer = original
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    again, _ = models.load(tmp_path / "m")
    for (name, p), (other, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(p, q)
