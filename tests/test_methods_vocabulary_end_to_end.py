"""Methods of whole distributions, and the retain loss kl, end to end on a tiny model that has memorized two secrets."""

import numpy as np
import peft
import pytest
import tiny
import torch
from coverings import in_full, slow
from unlearning_runs import Interrupted, run, same, timeless, weights

from pyunlearn.errors import DataError
from pyunlearn.methods import METHODS
from pyunlearn.metrics import NULL_MEAN, SIGNIFICANT
from pyunlearn.metrics.verdict import NOT_EXTRACTED
from pyunlearn.models.inspection import unwrapped
from pyunlearn.unlearning import api
from pyunlearn.unlearning.objectives import RetainTerm

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.full]


def sessions_of(monkeypatch):
    """Return a list to which every run's session is added."""
    sessions, setup = [], api.setup
    monkeypatch.setattr(api, "setup", lambda *args, **kwargs: sessions.append(setup(*args, **kwargs)) or sessions[-1])
    return sessions


@pytest.fixture(scope="module")
def clean(story):
    """A model that was never trained on the secrets."""
    torch.manual_seed(1)
    model = tiny.tiny_llama(len(story.tokenizer))
    tiny.train(model, story.tokenizer, tiny.sentences(400, 2), epochs=4)
    return model


def check_as_likely(result):
    """Check that two secrets are as likely as unseen ones, later examples untouched, and utility within its budget.

    They are forgotten where no more of their tokens are first choices than of unseen ones: these methods lower a text's
    mean by few of its tokens, and most do not get there.
    """
    limits = ("max_steps", "utility budget")
    assert result.stopped in (("forgotten",) if result.forgotten else ("still extracted", *limits))
    for e in result.examples[:2]:
        level = e.exposure_after <= NULL_MEAN
        assert level or result.stopped in limits  # the last rounds may lead back a little
        assert e.verdict == ("forgotten" if level and e.extraction_after <= NOT_EXTRACTED else "still exposed")
        assert e.exposure_after < SIGNIFICANT < e.exposure_before
        assert e.log_likelihood_after < e.log_likelihood_before
    assert {(e.verdict, e.steps) for e in result.examples[2:]} <= {("not memorized", 0)}
    assert result.utility.relative_rise <= result.utility.budget == 0.05


@pytest.mark.parametrize("method", ["ceu", *slow("CE-U"), "undial", "pdu", "pdu+kl", "ga+kl", "undial+kl"])
def test_two_secrets_become_as_likely_as_unseen_ones_and_the_rest_stays(story, method):
    """Down to the level of unseen text, within the utility budget; unseen text is not trained on."""
    weight = 4.0 if method.lower() in ("ceu", "ce-u") else 1.0
    result = run(story, story.forget + story.unseen, method=method, retain_weight=weight)
    check_as_likely(result)


@pytest.mark.parametrize("method", ["ceu", *slow("undial")])
def test_no_retain_set_is_needed(story, method):
    """This holds for the methods whose loss is bounded."""
    check_as_likely(run(story, method=method, retain=None))


def test_away_from_itself_the_model_forgets_in_small_steps(story):
    """KL's ascent begins at 0 and grows without bound: the default learning rate forgets in time."""
    check_as_likely(run(story, method="kl", learning_rate=None))


@pytest.mark.slow
def test_toward_a_model_without_the_secrets_there_is_a_gradient_from_the_start(story, clean):
    """The reference model was never trained on them (bad teaching), and is not changed."""
    before = weights(clean)
    result = run(story, method="kl", method_options={"direction": "toward"}, reference_model=clean)
    check_as_likely(result)
    assert result.history[0]["gradient_norm"] > 0.01
    assert same(clean, before)


@pytest.mark.parametrize("method", slow("undial+kl", "ceu", "pdu"))
def test_a_t5_forgets_completions(t5, method):
    """The decoder's distributions are those after an encoder's prompt."""
    check_as_likely(run(t5, t5.forget + t5.unseen, method=method, retain_weight=10.0))


def test_an_adapter_is_trained_with_no_copy_of_the_head(story, monkeypatch):
    """With LoRA the cached reference has hidden states alone, and shares the model's own head."""
    config = peft.LoraConfig(
        r=8, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=True
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(story.fresh(), config)
    sessions = sessions_of(monkeypatch)
    result = run(story, model=model, method="undial+kl", learning_rate=3e-3)
    assert all(e.exposure_after <= NULL_MEAN < SIGNIFICANT < e.exposure_before for e in result.examples)
    assert result.utility.relative_rise <= 0.05
    head = unwrapped(model).get_output_embeddings().weight
    reference = sessions[0].forget_term.reference
    assert [c.head.weight.data_ptr() for c in (reference.forget, reference.retain)] == [head.data_ptr()] * 2


def test_a_model_s_own_logits_are_used_where_its_head_cannot_be_read(story):
    """It is the same run up to rounding, with cached logits as wide as the vocabulary."""
    model = story.fresh()
    model.lm_head.__class__ = type("Odd", (torch.nn.Linear,), {})
    usual = run(story, method="undial+kl")
    with pytest.warns(UserWarning, match="uses the model's own logits"):
        own = run(story, model=model, method="undial+kl")
    check_as_likely(own)
    for name in ("forget_loss", "retain_kl"):
        assert [r[name] for r in own.history] == pytest.approx([r[name] for r in usual.history], rel=1e-3, abs=1e-4)


def test_the_retain_loss_kl_is_zero_at_first_and_then_retains(story):
    """It is 0 while the model is its reference; a large weight costs the retain set less than ascent alone."""
    retained = run(story, method="ga", retain_loss="kl", retain_weight=20.0)
    assert retained.history[0]["retain_kl"] == pytest.approx(0.0, abs=1e-6)
    assert all(r["retain_kl"] > 1e-5 for r in retained.history[1:])
    assert {r["retain_nll"] for r in retained.history} == {None}
    alone = run(story, method="ga", retain_loss=None)
    assert abs(retained.utility.relative_rise) < abs(alone.utility.relative_rise)


@pytest.mark.parametrize("method", ["pdu+kl", *in_full("undial+kl", "pdu")])
def test_micro_batches_take_the_same_steps(story, method):
    """One example at a time or all together: the same numbers, up to rounding."""
    whole, parted = (
        run(story, method=method, batch_size=4, max_steps=3, learning_rate=1e-4, micro_batch_size=n) for n in (None, 1)
    )
    for name in (
        "forget_loss",
        "gradient_norm",
        "retain_kl" if "+kl" in method else "retain_nll",
        *(["multiplier"] if method.startswith("pdu") else []),
    ):
        assert [r[name] for r in parted.history] == pytest.approx([r[name] for r in whole.history], rel=1e-3, abs=1e-5)


def test_only_the_examples_that_the_steps_read_are_cached(story, monkeypatch):
    """From a retain set larger than the run, the examples of its steps are cached and no others."""
    seen, sessions = [], sessions_of(monkeypatch)
    taken = RetainTerm.batch
    monkeypatch.setattr(
        RetainTerm, "batch", lambda self, indices, *forget: seen.append(indices) or taken(self, indices, *forget)
    )
    run(story, method="ga+kl", batch_size=4, max_steps=3, learning_rate=1e-6)
    cache = sessions[0].retain_term.reference.retain
    assert set(cache.ends) == {i for indices in seen for i in indices}
    assert len(cache.ends) == 12


# ---------------------------------------------------------------- PDU's multiplier


def test_the_multiplier_rises_where_the_constraint_is_broken_and_falls_where_it_holds(story):
    """The retain loss is above a tight bound and below a loose one."""
    tight, loose = (
        run(
            story,
            method="pdu",
            method_options={"retain_tolerance": t, "multiplier": 5.0, "multiplier_warmup": 1},
            max_steps=4,
            learning_rate=1e-5,
        )
        for t in (-0.5, 0.5)
    )
    for result, sign in ((tight, 1), (loose, -1)):
        values = [r["multiplier"] for r in result.history]
        assert values[:2] == [5.0, 5.0]
        assert (sign * np.diff(values[1:]) > 0).all()


def test_a_rollback_restores_the_multiplier(story):
    """It is the one before the round, as the weights are."""
    result = run(story, method="pdu", learning_rate=5e-3, batch_size=1)
    rounds = [r for r in result.history if "accepted" in r]
    assert not all(r["accepted"] for r in rounds)
    first = {r["round"]: r["multiplier"] for r in reversed(result.history)}
    for r in rounds:
        if not r["accepted"] and r["round"] + 1 in first:
            assert first[r["round"] + 1] == first[r["round"]]


@pytest.mark.parametrize(("method", "at"), [("pdu", 1), ("undial+kl", 1), *slow(("pdu", 3), ("undial+kl", 3))])
def test_an_interrupted_run_resumes_to_the_same_numbers(story, clean, tmp_path, monkeypatch, method, at):
    """The multiplier comes from the checkpoint, the reference from the model as it came; another one is refused."""
    options = {"max_steps": 6, "batch_size": 1, "learning_rate": 1e-4, "method": method}
    whole = run(story, **options)
    assert len(whole.history) == 6
    name, out = method.partition("+")[0], tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setitem(METHODS, name, tiny.with_loss(name, Interrupted(name, at)))
        cut_short = run(story, **options, output_dir=out)
    assert cut_short.stopped == "interrupted"
    resumed = run(story, **options, output_dir=out, resume=True)
    assert timeless(resumed.history) == timeless(whole.history)
    assert resumed.examples == whole.examples
    assert same(resumed.model, whole.model)
    if method == "undial+kl":
        with monkeypatch.context() as patch:
            patch.setitem(METHODS, name, tiny.with_loss(name, Interrupted(name, at)))
            run(story, **options, output_dir=tmp_path / "new")
        with pytest.raises(DataError, match="made with another model or reference model"):
            run(story, **options, output_dir=tmp_path / "new", resume=True, reference_model=clean)
    else:
        assert len({r["multiplier"] for r in whole.history}) == 6
