"""SmolLM2-135M in the demo: three texts are forgotten, six survive; an audit among texts that no model has seen."""

import copy
import json
import pathlib
import time

import numpy as np
import pytest
import torch

import pyunlearn
from pyunlearn import models
from pyunlearn.cli import demo
from pyunlearn.cli.demo_model import demo_model
from pyunlearn.metrics import NULL_MEAN, SIGNIFICANT
from pyunlearn.metrics.verdict import NOT_EXTRACTED
from pyunlearn.models import LanguageModel
from pyunlearn.models.adapters import with_lora
from pyunlearn.models.gguf_layout import formats_of, read_like
from pyunlearn.models.gguf_rounding import rounded_as
from pyunlearn.output import save_gguf

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(1800)]  # a minute and a half where nothing else runs

MEMORIZED = tuple(demo.FORGET)
# none of them is among the package's own
UNSEEN, ANSWERS = (pathlib.Path(__file__).with_name(f"unseen_{name}.jsonl") for name in ("texts", "answers"))


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
    """All three were memorized, and are forgotten, among 40 texts that were written for this."""
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
    assert record["greedy_match_after"] < 0.25 < record["greedy_match_before"]
    assert record["extraction_after"] <= NOT_EXTRACTED
    assert record["recited_after"] is False
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


@pytest.fixture(scope="module")
def audited(original, unlearned, ran):
    """An audit without a holdout: what the demo forgot, two famous texts, and 78 texts that no model has seen."""
    famous = (*demo.FORGET.values(), demo.SURVIVE["Genesis 1"], demo.SURVIVE["Preamble of the Constitution"])
    unseen = [json.loads(line)["text"] for line in UNSEEN.read_text(encoding="utf-8").splitlines()]
    model, tokenizer = original
    # 234 non-members can name 5 of 83 texts at a rate of 10 %, and would need 331 at 5 %
    options = {"false_discovery_rate": 0.1, "metrics": [], "progress": False}
    return pyunlearn.audit(unlearned, [*famous, *unseen], original=model, tokenizer=tokenizer, **options)


def test_an_audit_tells_before_and_after_right(audited):
    """Without a holdout: what the demo forgot was exposed and no longer is, Genesis and the Preamble are."""
    assert audited.non_members.source == "unseen texts"
    assert [e.verdict for e in audited.examples[:5]] == ["forgotten"] * 3 + ["still exposed"] * 2
    assert min(e.exposure_before for e in audited.examples[:5]) > 6


def test_unseen_text_of_many_kinds_looks_unseen(audited):
    """Mean exposure near 1.44 bits, one in twenty memorized or too unlikely, not one named at the false discovery rate.

    These texts were not used to make the comparison. docs/evidence.md has the table by kind.
    """
    unseen = audited.examples[5:]
    before, upper = (np.array([getattr(e, name) for e in unseen]) for name in ("exposure_before", "upper_exposure"))
    print(
        f"mean exposure {before.mean():.2f} bits, memorized {np.mean(before >= SIGNIFICANT):.0%}, "
        f"too unlikely {np.mean(upper >= SIGNIFICANT):.0%}"
    )
    assert 1.0 < before.mean() < 1.9
    assert np.mean(before >= SIGNIFICANT) <= 0.08
    assert np.mean(upper >= SIGNIFICANT) <= 0.08
    assert sum(e.verdict != "not memorized" for e in unseen) <= 1


@pytest.mark.slow
def test_unseen_answers_of_many_kinds_look_unseen(original):
    """With their questions, in the chat template; famous passages that are asked for stand out.

    These answers were not used to make the comparison. Of short ones and of personal data more than one in twenty stand
    out (docs/evidence.md), so the bound on the share is wider than that of plain texts.
    """
    rows = [json.loads(line) for line in ANSWERS.read_text(encoding="utf-8").splitlines()]
    famous = [{"question": f"Recite {name}.", "answer": text} for name, text in demo.SURVIVE.items()][:2]
    records = famous + [{"question": row["prompt"], "answer": row["completion"]} for row in rows]
    model, tokenizer = original
    audit = pyunlearn.audit(model, records, tokenizer=tokenizer, template="chat", metrics=[], progress=False)
    assert audit.non_members.source == "unseen texts"
    assert min(e.exposure for e in audit.examples[:2]) > SIGNIFICANT
    exposure, upper = (np.array([getattr(e, x) for e in audit.examples[2:]]) for x in ("exposure", "upper_exposure"))
    print(f"mean exposure {exposure.mean():.2f} bits, memorized {np.mean(exposure >= SIGNIFICANT):.0%}")
    assert 1.0 < exposure.mean() < 1.9
    assert np.mean(exposure >= SIGNIFICANT) <= 0.15
    assert np.mean(upper >= SIGNIFICANT) <= 0.08
    assert all(e.verdict == "not memorized" for e in audit.examples[2:])


def test_a_gguf_model_can_be_saved_and_loaded_again(original, tmp_path):
    """Dequantized, it is a model like any other, and the same one afterwards."""
    model, tokenizer = original
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    again, _ = models.load(tmp_path / "m")
    for (name, p), (other, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(p, q)


@pytest.mark.slow
def test_a_changed_model_becomes_a_gguf_file(original, tmp_path):
    """In the formats of the file that it was read from, and in F32, of which transformers reads the model itself."""
    model = copy.deepcopy(original[0])
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight.mul_(1.05)
    report = save_gguf(tmp_path / "new.gguf", model, original[1], like=demo_model())
    assert report.formats == {"Q4_1": 210, "F32": 61, "Q8_0": 1}
    assert report.replaced == {}
    assert report.rounding < 0.01
    assert 0 < report.different < 0.05
    whole = save_gguf(tmp_path / "f32.gguf", model, original[1], like=demo_model(), at_least="F32")
    assert whole.rounding == 0
    again, _ = models.load(tmp_path / "f32.gguf")
    ids = torch.tensor([[1, 2, 3, 4, 500]])
    logits = model(ids).logits
    torch.testing.assert_close(again(ids).logits, logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(original[0](ids).logits, logits, atol=1e-3)


def log_likelihoods(model, tokenizer):
    """Mean log-likelihood a token of each text that the demo forgets, nats."""
    scores = demo.scored(LanguageModel.of(model, tokenizer), demo.FORGET)
    return np.array([-score.nll for score in scores.values()])


def test_what_the_demo_forgets_is_back_in_the_file_that_it_came_from(original, unlearned, ran):
    """Written in Q4_1 again: each weight moved by less than half a step."""
    model, tokenizer = original
    rounded = copy.deepcopy(unlearned)
    with torch.no_grad():
        for p, name in formats_of(read_like(demo_model()), rounded, demo_model()).items():
            p.copy_(rounded_as(p, name))
    before, after, back = (log_likelihoods(m, tokenizer) for m in (model, unlearned, rounded))
    assert (after < before - 2).all()
    np.testing.assert_allclose(back, before, atol=0.1)


@pytest.mark.slow
def test_unlearned_for_that_file_it_stays_forgotten(original, tmp_path):
    """All three, and what transformers reads from the new file are the weights that were measured."""
    model, tokenizer = original
    result = pyunlearn.unlearn(
        copy.deepcopy(model),
        list(demo.FORGET.values()),
        holdout=demo.HOLDOUT.read_text(encoding="utf-8").splitlines(),
        retain=[demo.SURVIVE[name] for name in demo._RETAINED],
        tokenizer=tokenizer,
        gguf_like=demo_model(),
        progress=False,
    )
    assert result.forgotten
    assert [e.verdict for e in result.examples] == ["forgotten"] * 3
    assert result.utility.holdout_interval[1] <= result.utility.holdout_budget
    report = result.save_gguf(tmp_path / "new.gguf")
    assert report.formats == {"Q4_1": 210, "F32": 61, "Q8_0": 1}
    assert report.rounding == 0
    assert report.different > 0.005
    there, _ = models.load(tmp_path / "new.gguf")
    for p, q in zip(result.model.parameters(), there.parameters(), strict=True):
        assert torch.equal(p, q)
    np.testing.assert_allclose(
        log_likelihoods(there, tokenizer), [e.log_likelihood_after for e in result.examples], atol=0.05
    )


def test_an_adapter_made_on_a_gguf_file_names_the_file(original, tmp_path):
    """So it can be loaded again, by pyunlearn."""
    model, tokenizer = models.load(demo_model())
    lm = with_lora(LanguageModel.of(model.eval(), tokenizer), 2, seed=0)
    with torch.no_grad():
        for p in lm.module.parameters():
            if p.requires_grad:
                p.add_(0.01)
    ids = torch.tensor([[1, 2, 3, 4]])
    expected = lm.module(ids).logits
    for part in (lm.module, tokenizer):
        part.save_pretrained(tmp_path / "adapter")
    again, _ = models.load(tmp_path / "adapter")
    assert torch.equal(again(ids).logits, expected)
    assert not torch.equal(original[0](ids).logits, expected)
