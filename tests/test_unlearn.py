"""Unlearning end to end, on tiny models trained here: what is forgotten, what is kept, and what a run never does."""

import json
import math
import os
import signal
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import peft
import pytest
import tiny
import torch
from heads import Allocations
from transformers import AutoModelForCausalLM, AutoTokenizer

import pyunlearn
from pyunlearn import models
from pyunlearn.data import Tokens, encode, read_examples
from pyunlearn.errors import ArgumentError, DataError, ModelError, OutputError, TrainingError
from pyunlearn.methods import METHODS, npo
from pyunlearn.metrics import NULL_MEAN, SIGNIFICANT
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.models.sampling import COUNT, sample_non_members
from pyunlearn.unlearning.interrupt import DeferredInterrupt
from pyunlearn.unlearning.optimizer import MasterWeights, TrainedWeights
from pyunlearn.unlearning.stopping import StoppingRule

STEP = {"step", "round", "examples", "forget_loss", "retain_nll", "gradient_norm", "learning_rate", "seconds"}
ROUND = {"accepted", "rejection_reason", "active", "utility_rise", "mean_log_likelihood", "exposure"}


pytestmark = pytest.mark.usefixtures("one_thread")


def run(trained, forget=None, *, model=None, **options):
    """Unlearns on a copy of the trained model; with its retain set and its holdout, unless told otherwise."""
    options = {
        "retain": trained.retain,
        "holdout": trained.holdout,
        "learning_rate": 3e-4,
        "progress": False,
        **options,
    }
    model = trained.fresh() if model is None else model
    return pyunlearn.unlearn(
        model, trained.forget if forget is None else forget, tokenizer=trained.tokenizer, **options
    )


def weights(model):
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


def same(a, b):
    """Bit for bit, wherever both are numbers."""
    a, b = (x if isinstance(x, dict) else x.state_dict() for x in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name].nan_to_num(7.5), b[name].nan_to_num(7.5)) for name in a)


def timeless(history):
    return [{name: value for name, value in record.items() if name != "seconds"} for record in history]


def check_forgotten(result, trained, *, memorized=2):
    """The first examples were memorized and are forgotten; the others were not, and left alone; the rest is kept."""
    assert result.stopped == "forgotten"
    assert result.forgotten
    for e in result.examples[:memorized]:
        assert e.verdict == "forgotten"
        assert e.forgotten
        assert e.exposure_before > SIGNIFICANT
        assert e.exposure_after <= NULL_MEAN
        assert e.upper_exposure_after < SIGNIFICANT
        assert e.log_likelihood_after < e.log_likelihood_before
        assert e.greedy_match_after < e.greedy_match_before
        assert e.steps > 0
    for e in result.examples[memorized:]:
        assert e.verdict == "not memorized"
        assert not e.forgotten
        assert e.exposure_before < SIGNIFICANT
        assert e.upper_exposure_after < SIGNIFICANT
        assert e.steps == 0
    assert result.utility.relative_rise <= result.utility.budget == 0.05


# ---------------------------------------------------------------- it forgets, whatever the model and the text


def test_sentences_leave_a_llama_and_unseen_ones_are_left_alone(story):
    """Memorized and never-trained ones together: those are forgotten, these 'not memorized', the retain text kept."""
    result = run(story, story.forget + story.unseen)
    check_forgotten(result, story)
    assert [e.text for e in result.examples] == story.forget + story.unseen
    before, after = (
        tiny.negative_log_likelihoods(story, story.retain, model).mean() for model in (story.model, result.model)
    )
    assert result.utility.nll_before == pytest.approx(before, rel=1e-5)
    assert result.utility.nll_after == pytest.approx(after, rel=1e-5)
    assert result.utility.relative_rise == pytest.approx((after - before) / max(before, 1), abs=1e-5)
    assert (result.utility.measured_on, result.utility.sequences) == ("retain set", len(story.retain))
    for e, nll in zip(
        result.examples, tiny.negative_log_likelihoods(story, story.forget + story.unseen, result.model), strict=True
    ):
        assert -e.log_likelihood_after == pytest.approx(nll, rel=1e-5)


def test_sentences_leave_a_llama_with_nothing_but_model_and_forget(story):
    """Completions sampled from the model stand in for the holdout, and for the retain set."""
    result = run(story, story.forget + story.unseen, retain=None, holdout=None)
    check_forgotten(result, story)
    assert result.utility.sequences == COUNT
    assert "sampled" in result.utility.measured_on
    assert {e.exposure_before for e in result.examples[:2]} == {math.log2(COUNT + 1)}


def test_a_holdout_alone_is_watched_in_place_of_a_retain_set(story):
    """Without a retain set nothing is trained on beside, and the holdout's likelihood is the utility."""
    result = run(story, retain=None)
    check_forgotten(result, story)
    assert result.utility.measured_on == "holdout"
    assert {record["retain_nll"] for record in result.history} == {None}


def test_answers_of_a_jsonl_file_leave_a_gpt2(answers, tmp_path):
    """Questions and answers, from files; a tokenizer without a pad token; only the answers are scored."""
    paths = {}
    for role, rows in (
        ("forget", answers.forget + answers.unseen),
        ("retain", answers.retain),
        ("holdout", answers.holdout),
    ):
        paths[role] = tmp_path / f"{role}.jsonl"
        paths[role].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert answers.tokenizer.pad_token is None
    result = run(answers, paths["forget"], retain=str(paths["retain"]), holdout=paths["holdout"])
    check_forgotten(result, answers)
    answer = answers.tokenizer(" " + answers.forget[0]["answer"])["input_ids"]
    assert abs(result.examples[0].tokens - len(answer) - 1) <= 1


def test_chat_messages_leave_a_llama_with_a_chat_template():
    """The last turn is scored, as the template writes it."""
    chats = tiny.chatter()
    result = run(chats, chats.forget + chats.unseen)
    check_forgotten(result, chats)
    assert result.examples[0].text.endswith(chats.forget[0]["messages"][-1]["content"])


def test_completions_leave_a_t5(t5):
    """The encoder reads the prompt, the decoder's completion is forgotten."""
    check_forgotten(run(t5, t5.forget + t5.unseen, retain_weight=4.0), t5)


def test_plain_texts_leave_a_t5():
    """Of a plain text the encoder reads nothing but the end of text."""
    writer = tiny.writer()
    check_forgotten(run(writer, writer.forget + writer.unseen, retain_weight=4.0), writer)


@pytest.mark.parametrize("method", ["ga", "npo", "simnpo", "graddiff", "npo+nll", "simnpo+nll"])
def test_every_method_does_its_job(story, method):
    """By its name alone; the compound ones train on the retain set."""
    result = run(story, method=method)
    check_forgotten(result, story)
    assert all(record["retain_nll"] > 0 for record in result.history)
    if "+" not in method and method != "graddiff":
        alone = run(story, method=method, retain_loss=None)
        check_forgotten(alone, story)
        assert {record["retain_nll"] for record in alone.history} == {None}


def test_what_was_never_trained_on_changes_nothing(story):
    """The weights are the same bits, there is no step, and the run says why."""
    result = run(story, story.unseen)
    assert result.stopped == "nothing memorized"
    assert result.forgotten
    assert result.history == []
    assert {(e.verdict, e.steps) for e in result.examples} == {("not memorized", 0)}
    assert same(result.model, story.model)


# ---------------------------------------------------------------- sampled references


def test_references_of_plain_texts_are_sampled_from_the_beginning_of_text(story):
    """As many and as long as asked for, all of it scored; the seed decides, and the global generator is left alone."""
    tokens = encode(read_examples(story.forget, role="x"), story.tokenizer, role="x", max_length=None)
    state = torch.get_rng_state()
    found = sample_non_members(LanguageModel.of(story.model, story.tokenizer), tokens)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(found) == COUNT
    length = sorted(len(t.scored) for t in tokens)[1]
    assert {(t.ids[0], t.first, len(t.scored)) for t in found} == {(story.tokenizer.bos_token_id, 1, length)}
    assert len(set(found)) > COUNT / 2
    assert sample_non_members(LanguageModel.of(story.model, story.tokenizer), tokens) == found
    assert sample_non_members(LanguageModel.of(story.model, story.tokenizer), tokens, seed=1) != found
    assert len(sample_non_members(LanguageModel.of(story.model, story.tokenizer), tokens, count=5)) == 5


@pytest.mark.parametrize("scored", [3, 20, 60])
def test_references_are_as_long_as_the_forget_texts_within_8_to_48(story, scored):
    """The median of theirs."""
    tokens = [Tokens(tuple(range(10, 11 + n)), 1) for n in (2, scored, 70)]
    found = sample_non_members(LanguageModel.of(story.model, story.tokenizer), tokens, count=3)
    assert {len(t.scored) for t in found} == {min(48, max(8, scored))}


@pytest.mark.parametrize("kind", ["answers", "t5"])
def test_references_of_prompts_depart_from_the_memorized_answer(kind, request):
    """Each prompt is answered, never with the memorized first token, and that token is not scored."""
    trained = request.getfixturevalue(kind)
    both = kind == "t5"
    tokens = encode(
        read_examples(trained.forget, role="x"), trained.tokenizer, role="x", max_length=None, encoder_decoder=both
    )  # fmt: skip
    found = sample_non_members(LanguageModel.of(trained.model, trained.tokenizer), tokens)
    assert len(found) == COUNT
    for t, source in zip(found, [tokens[0]] * (COUNT // 2) + [tokens[1]] * (COUNT // 2), strict=True):
        prompt = source.ids if both else source.ids[: source.first]
        assert (t.ids if both else t.ids[: len(prompt)]) == prompt
        assert t.first == (1 if both else len(prompt) + 1)
        assert t.written[t.first - 1] != source.scored[0]
        assert 1 <= len(t.scored) <= 48
        assert trained.tokenizer.eos_token_id not in t.scored[:-1]
    assert sample_non_members(LanguageModel.of(trained.model, trained.tokenizer), tokens) == found
    assert sample_non_members(LanguageModel.of(trained.model, trained.tokenizer), tokens, seed=1) != found


def test_references_stay_within_the_model_s_context(answers):
    """A long prompt beside long answers: together they would run past GPT-2's last position."""
    long_prompt, long_answer = Tokens((9,) * 60, 56), Tokens((9,) * 60, 2)
    found = sample_non_members(LanguageModel.of(answers.model, answers.tokenizer), [long_prompt, long_answer], count=4)
    assert len(found) == 4
    assert all(len(t) <= 64 for t in found)
    assert all(t.scored for t in found)


# ---------------------------------------------------------------- the same again


def test_the_same_seed_gives_the_same_run_bit_for_bit(story):
    """Weights, verdicts and history; sampled references and dropout layers included."""
    first, again = (run(story, retain=None, holdout=None, seed=3) for _ in range(2))
    assert same(first.model, again.model)
    assert timeless(first.history) == timeless(again.history)
    assert first.examples == again.examples
    assert first.utility == again.utility
    assert not same(first.model, story.model)


class Interrupted:
    """A method whose loss, at its `at`-th call, does as Ctrl-C does."""

    def __init__(self, method, at):
        self.loss, self.left = METHODS[method].function, at

    def __call__(self, *args, **options):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.loss(*args, **options)


RESUMED = {
    "plain": {},
    "many batches": {"batch_size": 1, "retain": None},
    "steps taken back": {"learning_rate": 5e-3},
    "bfloat16": {},
}


@pytest.mark.parametrize("at", [0, 2, 4])
@pytest.mark.parametrize("setting", RESUMED)
def test_an_interrupted_run_goes_on_with_the_numbers_of_an_uninterrupted_one(story, tmp_path, monkeypatch, at, setting):
    """Weights, optimizer, order, halvings, history, steps come back from the checkpoint, from mid-round as well."""
    options = {"max_steps": 8, **RESUMED[setting]}
    model = story.fresh().bfloat16() if setting == "bfloat16" else story.fresh()
    start, forget = weights(model), story.forget + story.unseen
    whole = run(story, forget, **options, model=model)
    assert len(whole.history) > at
    if setting == "steps taken back":
        assert not whole.history[0]["accepted"]

    model.load_state_dict(start)
    out = tmp_path / "out"
    cut = tiny.with_loss("ga", Interrupted("ga", at))
    with monkeypatch.context() as patch:
        patch.setitem(METHODS, "ga", cut)
        broken = run(story, forget, **options, model=model, output_dir=out)
    assert broken.stopped == "interrupted"
    assert not out.exists()
    assert (tmp_path / "out.checkpoint.pt").exists()
    assert timeless(broken.history) == timeless(whole.history)[: len(broken.history)]
    assert len(broken.history) <= at
    assert not broken.history or "accepted" in broken.history[-1]

    model.load_state_dict(start)
    resumed = run(story, forget, **options, model=model, output_dir=out, resume=True)
    assert resumed.stopped == whole.stopped
    assert timeless(resumed.history) == timeless(whole.history)
    assert resumed.examples == whole.examples
    assert resumed.utility == whole.utility
    assert same(resumed.model, whole.model)
    assert (out / "result.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("within", ["keep", "measure", "step"])
def test_a_signal_never_falls_into_the_middle_of_a_step(story, tmp_path, monkeypatch, within):
    """A real Ctrl-C while weights are being copied, scored or updated waits until they are whole: resumed, the numbers are an uninterrupted run's."""
    model = story.fresh()
    start, options = weights(model), {"max_steps": 8, "batch_size": 1, "learning_rate": 2e-4}
    whole = run(story, **options, model=model)
    model.load_state_dict(start)
    owner, name = {
        "keep": (TrainedWeights, "_copy_moments"),
        "measure": (StoppingRule, "rejection_reason"),
        "step": (torch.optim.AdamW, "step"),
    }[within]
    original, calls = getattr(owner, name), []

    def interrupted(self, *args, **kwargs):
        calls.append(name)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)  # the handler runs here
        return original(self, *args, **kwargs)

    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        broken = run(story, **options, model=model, output_dir=tmp_path / "out")
    assert broken.stopped == "interrupted"
    assert signal.getsignal(signal.SIGINT) is handler
    model.load_state_dict(start)
    resumed = run(story, **options, model=model, output_dir=tmp_path / "out", resume=True)
    assert timeless(resumed.history) == timeless(whole.history)
    assert same(resumed.model, whole.model)


def test_a_second_signal_interrupts_at_once():
    """Whoever presses Ctrl-C twice does not want to wait."""
    with pytest.raises(KeyboardInterrupt), DeferredInterrupt() as interrupt:  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert interrupt.pending
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        pytest.fail("the second signal was not heard")


def test_an_interrupted_run_leaves_the_last_good_weights_in_the_model(story, tmp_path, monkeypatch):
    """The steps since the last evaluation are taken back, and their counts with them."""
    cut = tiny.with_loss("ga", Interrupted("ga", 1))
    monkeypatch.setitem(METHODS, "ga", cut)
    broken = run(story, batch_size=1, output_dir=tmp_path / "out")
    assert broken.stopped == "interrupted"
    assert broken.history == []
    assert [e.steps for e in broken.examples] == [0, 0]
    assert same(broken.model, story.model)


def test_resume_needs_to_know_where(story):
    """One sentence, before anything happens."""
    with pytest.raises(ArgumentError, match="no output_dir was given"):
        run(story, resume=True)


def test_a_checkpoint_of_something_else_is_refused(story, tmp_path, monkeypatch):
    """Other texts, another model, other settings, or no word of resuming: one sentence each, and model and checkpoint stay as they are."""
    out, checkpoint = tmp_path / "out", tmp_path / "out.checkpoint.pt"
    with monkeypatch.context() as patch:
        patch.setitem(METHODS, "ga", tiny.with_loss("ga", Interrupted("ga", 1)))
        assert run(story, output_dir=out).stopped == "interrupted"
    before, other = checkpoint.read_bytes(), story.fresh()
    with torch.no_grad():
        other.lm_head.weight.mul_(0.9)
    for changes, message in (
        ({"seed": 1}, "seed=0, not 1"),
        ({"learning_rate": 1e-4}, "learning_rate=0.0003, not 0.0001"),
        ({"method": "npo"}, "method='ga', not 'npo'"),
        ({"forget": story.forget[:1]}, "another model or forget set"),
        ({"holdout": story.holdout[::-1]}, "another model or holdout"),
        ({"model": other}, "another model or forget set"),
    ):
        model = changes.pop("model", None) or story.fresh()
        start = weights(model)
        with pytest.raises(DataError, match=message):
            run(story, **changes, model=model, output_dir=out, resume=True)
        assert all(torch.equal(w, start[name]) for name, w in model.state_dict().items())
    with pytest.raises(ArgumentError, match="holds an interrupted run: continue it with resume=True"):
        run(story, output_dir=out)
    assert checkpoint.read_bytes() == before


def test_samples_are_the_models_own_whatever_its_generation_config_says(story):
    """A penalty, a temperature, a top-p that a model was saved with would make references that it does not typically write."""
    tokens = encode(read_examples(story.forget, role="forget"), story.tokenizer, role="forget", max_length=None)
    model = story.fresh()
    plain = sample_non_members(LanguageModel.of(model, story.tokenizer), tokens, count=20)
    config = model.generation_config
    config.update(repetition_penalty=1.5, no_repeat_ngram_size=1, temperature=0.3, top_p=0.5, do_sample=True)
    assert sample_non_members(LanguageModel.of(model, story.tokenizer), tokens, count=20) == plain
    assert model.generation_config is config


# ---------------------------------------------------------------- what a run never does


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_run_never_takes_more_than_max_steps(story, steps, batch_size):
    """Not even in the middle of a round."""
    result = run(story, max_steps=steps, batch_size=batch_size, learning_rate=1e-6)
    assert result.stopped == "max_steps"
    assert len(result.history) == steps
    assert [record["step"] for record in result.history] == list(range(1, steps + 1))
    assert sum(len(record["examples"]) for record in result.history) == sum(e.steps for e in result.examples)
    assert {e.verdict for e in result.examples} == {"still exposed"}
    assert not result.forgotten


@pytest.mark.parametrize("budget", [0.0, 1e-4, 0.003])
def test_a_run_never_spends_more_than_its_utility_budget(story, budget):
    """It ends with the last state within it, measured from outside; the verdict is honest."""
    result = run(story, retain=None, utility_budget=budget, learning_rate=1e-3)
    assert result.stopped == "utility budget"
    assert "still exposed" in {e.verdict for e in result.examples}
    assert not result.forgotten
    before, after = (
        tiny.negative_log_likelihoods(story, story.holdout, model).mean() for model in (story.model, result.model)
    )
    assert (after - before) / max(before, 1.0) <= budget + 1e-6
    assert result.utility.nll_after == pytest.approx(after, rel=1e-5)
    refused = [record for record in result.history if record.get("rejection_reason")]
    assert len(refused) == 7
    assert all(record["utility_rise"] > budget for record in refused)
    assert [record["learning_rate"] for record in refused] == pytest.approx([1e-3 / 2**i for i in range(7)])
    if all(record.get("accepted") is not True for record in result.history):
        assert same(result.model, story.model)
        assert {e.steps for e in result.examples} == {0}


@pytest.mark.parametrize("learning_rate", [0.01, 0.5])
@pytest.mark.parametrize("method", ["ga", "npo"])
def test_a_learning_rate_far_too_high_never_over_unlearns(story, learning_rate, method):
    """Every step that goes too far is taken back: it ends finite, within the budget, and not below unseen text."""
    result = run(story, story.forget + story.unseen, learning_rate=learning_rate, method=method)
    assert any(record.get("rejection_reason") for record in result.history)
    assert "over-unlearned" not in {e.verdict for e in result.examples}
    assert all(e.upper_exposure_after < SIGNIFICANT for e in result.examples)
    assert all(torch.isfinite(p).all() for p in result.model.parameters())
    assert result.utility.relative_rise <= 0.05
    assert tiny.negative_log_likelihoods(story, story.retain, result.model).mean() == pytest.approx(
        result.utility.nll_after, rel=1e-5
    )
    assert result.stopped in ("forgotten", "utility budget", "over-unlearning")


def test_a_step_that_is_not_finite_is_taken_back(story, monkeypatch):
    """After all halvings the weights are the first ones, bit for bit, and the record is still JSON."""
    poisoned = tiny.with_loss("ga", lambda forget, lengths, **_: forget * math.nan)
    monkeypatch.setitem(METHODS, "ga", poisoned)
    for model in (story.fresh(), story.fresh().bfloat16()):
        start = weights(model)
        result = run(story, model=model)
        assert result.stopped == "not finite"
        assert {record["rejection_reason"] for record in result.history} == {"not finite"}
        assert same(result.model, start)
        assert {(e.verdict, e.steps) for e in result.examples} == {("still exposed", 0)}
        json.dumps(result.to_dict(), allow_nan=False)


def test_one_poisoned_step_does_no_harm(story, monkeypatch):
    """The run goes on from the last good state, at half the learning rate."""
    calls = []

    def loss(forget, lengths, **_):
        calls.append(1)
        return forget / lengths * (math.nan if len(calls) == 2 else 1.0)

    monkeypatch.setitem(METHODS, "ga", tiny.with_loss("ga", loss))
    result = run(story)
    check_forgotten(result, story)
    assert [record["rejection_reason"] for record in result.history][:3] == [None, "not finite", None]
    assert [record["learning_rate"] for record in result.history][:3] == [3e-4, 3e-4, 1.5e-4]


def test_a_model_that_is_broken_from_the_start_is_refused(story):
    """NaN in the weights: one sentence, and nothing has been changed."""
    model = story.fresh()
    with torch.no_grad():
        model.model.norm.weight[3] = math.nan
    start = weights(model)
    with pytest.raises(TrainingError, match="NaN or Inf for the forget set before the first step"):
        run(story, model=model)
    assert same(model, start)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number, 1 or more, got 0"),
        ({"batch_size": "8"}, "batch_size must be a whole number, 1 or more, got '8'"),
        ({"max_steps": -1}, "max_steps must be a whole number, 0 or more, got -1"),
        ({"utility_budget": math.nan}, "utility_budget must be a number, 0 or more, got nan"),
        ({"learning_rate": 0}, "learning_rate must be a number, above 0 and below 1, got 0"),
        ({"learning_rate": 3.0}, "learning_rate must be a number, above 0 and below 1, got 3.0"),
        ({"method": "npoo"}, "no method 'npoo'; did you mean \"npo\""),
        ({"method": "graddiff", "retain": None}, "needs text to keep: pass retain="),
        ({"method_options": {"beta": 1.0}}, "'ga' has no option 'beta'"),
    ],
)
def test_an_option_that_cannot_be_is_refused_before_anything_happens(story, options, message):
    """One sentence that names it."""
    model = story.fresh()
    with pytest.raises(ArgumentError, match=message):
        run(story, model=model, **options)
    assert same(model, story.model)


def test_a_model_without_a_head_or_a_tokenizer_is_refused(story):
    """One sentence each, that says how to mend it."""
    with pytest.raises(ModelError, match="LlamaModel has no language-model head"):
        run(story, model=story.fresh().model)
    with pytest.raises(ModelError, match="a path or a name, got Linear"):
        run(story, model=torch.nn.Linear(2, 2))
    model = story.fresh()
    model.name_or_path = model.config._name_or_path = ""
    with pytest.raises(ModelError, match="pass tokenizer="):
        pyunlearn.unlearn(model, story.forget)


# ---------------------------------------------------------------- precisions, adapters, references


def test_16_bit_weights_are_trained_through_float32_copies():
    """Steps too small for bfloat16 add up, as they do in float32; in bfloat16 alone nothing moves."""
    wide, narrow, naive = (
        torch.nn.Parameter(torch.ones(4, dtype=d)) for d in (torch.float32, torch.bfloat16, torch.bfloat16)
    )
    optimizers = [
        torch.optim.AdamW([wide], lr=1e-4, weight_decay=0.0), MasterWeights([narrow], 1e-4),
        torch.optim.AdamW([naive], lr=1e-4, weight_decay=0.0),
    ]  # fmt: skip
    for _ in range(200):
        for p, optimizer in zip((wide, narrow, naive), optimizers, strict=True):
            p.grad = torch.full_like(p, 0.25)
            optimizer.step()
    assert torch.equal(naive, torch.ones_like(naive))
    assert torch.equal(narrow, wide.bfloat16())
    assert (wide < 0.99).all()


def test_a_state_goes_back_to_what_it_kept(story):
    """Weights and their float32 copies, bit for bit; the optimizer forgets the way."""
    for model in (story.fresh(), story.fresh().bfloat16()):
        state, start = TrainedWeights(model, 1e-3), weights(model)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            state.optimizer.step()
        assert not same(model, start)
        state.rollback()
        assert same(model, start)
        assert not state._adam.state
        state.set_learning_rate(0.25)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        state.optimizer.step()
        biggest = max((p.detach().float() - start[n].float()).abs().max().item() for n, p in model.named_parameters())
        assert biggest == pytest.approx(0.25, rel=0.02)


def test_a_bfloat16_model_forgets(story):
    """And stays a bfloat16 model."""
    result = run(story, model=story.fresh().bfloat16())
    check_forgotten(result, story)
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}
    assert not same(result.model, story.fresh().bfloat16())


def test_adapters_alone_are_trained(story, tmp_path):
    """With PEFT the base weights stay the same bits, adapters are saved, and have a default rate of their own."""
    config = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = peft.get_peft_model(story.fresh(), config)
    start = weights(model)
    result = run(story, model=model, learning_rate=3e-3)
    check_forgotten(result, story)
    changed = {name for name, p in result.model.state_dict().items() if not torch.equal(p, start[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    with result.model.disable_adapter():
        original = tiny.negative_log_likelihoods(story, story.forget, result.model)
    np.testing.assert_allclose(original, [-e.log_likelihood_before for e in result.examples], rtol=1e-5)
    assert (result.save(tmp_path / "out") / "adapter_model.safetensors").exists()
    again = peft.PeftModel.from_pretrained(story.fresh(), tmp_path / "out")
    np.testing.assert_allclose(
        tiny.negative_log_likelihoods(story, story.forget, again),
        [-e.log_likelihood_after for e in result.examples],
        rtol=1e-5,
    )
    fresh = peft.get_peft_model(story.fresh(), config)
    assert run(story, model=fresh, learning_rate=None, max_steps=0).settings["learning_rate"] == 1e-4
    assert run(story, learning_rate=None, max_steps=0).settings["learning_rate"] == 5e-6


def test_frozen_weights_are_not_trained(story):
    """What does not require a gradient stays as it is."""
    model = story.fresh()
    for p in model.model.embed_tokens.parameters():
        p.requires_grad_(False)
    result = run(story, model=model, max_steps=2)
    assert torch.equal(result.model.model.embed_tokens.weight, story.model.model.embed_tokens.weight)
    assert not same(result.model, story.model)


def test_npo_compares_with_the_reference_model(story):
    """By default with the model as it came; with another where one is given, which is left as it is."""
    default, given = run(story, method="npo"), run(story, method="npo", reference_model=story.fresh())
    assert same(default.model, given.model)
    torch.manual_seed(1)
    other = tiny.tiny_llama(len(story.tokenizer))
    start = weights(other)
    result = run(story, method="npo", method_options={"beta": 0.3}, reference_model=other, max_steps=1)
    assert same(other, start)
    tokens = encode(read_examples(story.forget, role="x"), story.tokenizer, role="x", max_length=None)
    lengths = np.array([len(t.scored) for t in tokens])
    sums = [
        torch.tensor(-tiny.negative_log_likelihoods(story, story.forget, m) * lengths) for m in (story.model, other)
    ]
    assert result.history[0]["forget_loss"] == pytest.approx(npo(*sums, beta=0.3).item(), rel=1e-4)
    with pytest.raises(ModelError, match="another vocabulary"):
        run(story, method="npo", reference_model=tiny.tiny_llama(77))


# ---------------------------------------------------------------- what is returned, and what is written


def test_the_history_has_one_record_a_step_and_the_state_after_each_round(story):
    """Every field that is documented, in every record; and all of it is JSON."""
    result = run(story, story.forget + story.unseen, batch_size=1, learning_rate=1e-3)
    rounds = [record for record in result.history if "accepted" in record]
    assert all(record.keys() in (STEP, STEP | ROUND) for record in result.history)
    assert [record["step"] for record in result.history] == list(range(1, len(result.history) + 1))
    assert result.history[-1] is rounds[-1]
    assert [record["round"] for record in rounds] == list(range(len(rounds)))
    assert all(len(record["exposure"]) == len(record["mean_log_likelihood"]) == 4 for record in rounds)
    last = [record for record in rounds if record["accepted"]][-1]
    assert last["active"] == 0
    assert last["exposure"] == [e.exposure_after for e in result.examples]
    assert last["mean_log_likelihood"] == [e.log_likelihood_after for e in result.examples]
    assert last["utility_rise"] == result.utility.relative_rise
    low, high = result.utility.interval
    assert low <= result.utility.relative_rise <= high
    then, now = (tiny.negative_log_likelihoods(story, story.holdout, m) for m in (story.model, result.model))
    assert result.utility.non_member_drift == pytest.approx((now - then).mean(), abs=1e-5) != 0

    data = result.to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == json.loads(json.dumps(data))
    assert data.keys() == {"forgotten", "stopped", "non_member_scores", "utility", "examples", "settings", "history"}
    assert data["examples"][0] == {**asdict(result.examples[0]), "forgotten": True}
    assert data["settings"]["pyunlearn"] == pyunlearn.__version__
    assert (data["settings"]["method"], data["settings"]["learning_rate"], data["settings"]["seed"]) == ("ga", 1e-3, 0)


def test_a_saved_result_loads_as_the_model_it_was(story, tmp_path):
    """safetensors, tokenizer and result.json; the likelihoods are the same after loading."""
    result = run(story, output_dir=tmp_path / "a" / "out")
    out = tmp_path / "a" / "out"
    names = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "result.json"} <= names
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert same(model, result.model)
    assert tokenizer(story.forget)["input_ids"] == story.tokenizer(story.forget)["input_ids"]
    np.testing.assert_allclose(
        tiny.negative_log_likelihoods(story, story.forget, model),
        [-e.log_likelihood_after for e in result.examples],
        rtol=1e-5,
    )
    written = json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(result.to_dict()))
    assert str(out) in written["settings"]["output_dir"]
    (tmp_path / "empty").mkdir()
    assert result.save(tmp_path / "empty") == tmp_path / "empty"
    loaded, _ = models.load(tmp_path / "empty")
    assert same(loaded, model)


def test_a_path_is_loaded_and_unlearned(story, tmp_path):
    """Model and tokenizer from one folder; the folder is not touched."""
    story.model.save_pretrained(tmp_path / "m")
    story.tokenizer.save_pretrained(tmp_path / "m")
    before = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    result = pyunlearn.unlearn(
        tmp_path / "m", story.forget, retain=story.retain, holdout=story.holdout, learning_rate=3e-4, progress=False
    )
    check_forgotten(result, story)
    assert same(result.model, run(story).model)
    assert {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()} == before


def test_an_output_folder_that_is_not_empty_is_refused_before_anything_is_changed(story, tmp_path):
    """So is a file; what lies there stays."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    model = story.fresh()
    for target, message in ((tmp_path / "out", "is not empty"), (tmp_path / "out" / "mine.txt", "is a file")):
        with pytest.raises(OutputError, match=message):
            run(story, model=model, output_dir=target)
        with pytest.raises(OutputError, match=message):
            run(story, story.unseen).save(target)
    assert same(model, story.model)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"


def test_a_mount_point_is_filled(story, tmp_path, monkeypatch):
    """An output folder that cannot be replaced, such as a volume of a container, gets the files themselves, and nothing else."""
    out = tmp_path / "out"
    out.mkdir()
    before = out.stat().st_ino
    monkeypatch.setattr(Path, "is_mount", lambda self: self == out)
    monkeypatch.setattr(Path, "rmdir", lambda self: pytest.fail("a mount point cannot be removed"))
    run(story, story.unseen).save(out)
    assert out.stat().st_ino == before
    names = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "result.json", "config.json"} <= names
    assert not any(name.startswith(".") for name in names)
    AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize(
    ("error", "raised"), [(OSError("disk full"), OutputError), (RuntimeError("odd"), RuntimeError)]
)
def test_a_result_is_saved_in_whole_or_not_at_all(story, tmp_path, monkeypatch, error, raised):
    """A save that breaks in the middle leaves nothing behind."""
    result = run(story, story.unseen)
    (tmp_path / "out").mkdir()

    def half(folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(result.model, "save_pretrained", half)
    for target in (tmp_path / "out", tmp_path / "new"):
        with pytest.raises(raised, match=str(error)):
            result.save(target)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert list((tmp_path / "out").iterdir()) == []


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("method", [*sorted(METHODS), "undial+kl"])
def test_no_logits_in_whole(story, answers, method):
    """With little workspace, no flat buffer and nothing as wide as the vocabulary is ever larger than it, but the head and what is shaped like it."""
    trained = answers if method == "idk" else story  # it refuses prompts
    width, vocabulary = trained.model.get_input_embeddings().weight.shape[::-1]
    workspace = 64 << 10
    with Allocations() as used:
        winners = {"winners": story.unseen} if method in METHODS and "winners" in METHODS[method].needs else {}
        result = run(
            trained, method=method, method_options=winners, retain_loss="auto", workspace=workspace, max_steps=3
        )
    assert len(result.history) == 3
    wide = {  # the ops keep logits in flat buffers
        shape: size
        for shape, size in used.shapes.items()
        if len(shape) == 1 or (vocabulary in shape and shape[-1] != width)
    }
    assert 8 * 12 * vocabulary * 4 > 2 * workspace  # so that the logits of a batch of 8 texts would be seen
    assert not {shape: size for shape, size in wide.items() if size > workspace}
    # what is largest is an activation inside a block: of GPT-2, 4 times as wide as its hidden states
    assert used.largest <= 5 * max(p.nbytes for p in trained.model.parameters())
