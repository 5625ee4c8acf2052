"""unlearn() end to end on tiny models trained here: memorized text is forgotten, all other text is left as it was."""

import json
import math

import numpy as np
import peft
import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from coverings import in_full
from unlearning_runs import apart, check_forgotten, run, same, timeless, weights

import pyunlearn
from pyunlearn.models.sampling import COUNT, OWN_COUNT

pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------- texts and architectures


def test_a_llama_forgets_memorized_sentences_and_leaves_unseen_ones_alone(story):
    """Every number of the result agrees with a plain loop over the model's own logits."""
    result = run(story, story.forget + story.unseen)
    check_forgotten(result, story)
    assert [e.text for e in result.examples] == story.forget + story.unseen
    before, after = (
        tiny.negative_log_likelihoods(story, apart(story.corpus), model).mean() for model in (story.model, result.model)
    )
    assert result.utility.nll_before == pytest.approx(before, rel=1e-5)
    assert result.utility.nll_after == pytest.approx(after, rel=1e-5)
    assert result.utility.relative_rise == pytest.approx((after - before) / max(before, 1), abs=1e-5)
    assert (result.utility.measured_on, result.utility.sequences) == ("retain texts set apart", 40)
    for e, nll in zip(
        result.examples, tiny.negative_log_likelihoods(story, story.forget + story.unseen, result.model), strict=True
    ):
        assert -e.log_likelihood_after == pytest.approx(nll, rel=1e-5)


@pytest.mark.full
def test_verdicts_in_bfloat16_are_those_in_float32(story, monkeypatch, own_accelerate):
    """On a CPU too, where ACCELERATE_MIXED_PRECISION asks for it; the weights stay float32."""
    verdicts = {}
    for precision in ("no", "bf16"):
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
        result = run(story, story.forget + story.unseen)
        verdicts[precision] = [e.verdict for e in result.examples]
        assert {p.dtype for p in result.model.parameters()} == {torch.float32}
    assert verdicts["bf16"] == verdicts["no"]
    assert set(verdicts["no"]) == {"forgotten", "not memorized"}


def test_model_and_forget_set_are_enough(story):
    """Text sampled from the model stands in for the holdout, and other text of its own for the retain set."""
    result = run(story, story.forget + story.unseen, retain=None, holdout=None)
    assert result.stopped == "no likelier"
    assert [e.verdict for e in result.examples] == ["no likelier"] * 2 + ["not memorized"] * 2
    assert result.passed
    assert not result.forgotten  # which the model's own text cannot show
    assert result.evidence == "self-sampled"
    compared, held = result.notes
    assert held.startswith(f"Without a retain set, the run held {OWN_COUNT} texts that the model wrote.")
    assert compared.startswith(
        f"Compared with {COUNT} texts that the model wrote, since no holdout was given and the token"
    )
    assert result.utility.sequences == COUNT
    assert "sampled" in result.utility.measured_on
    assert {e.exposure_before for e in result.examples[:2]} == {math.log2(COUNT + 1)}


def test_without_a_retain_set_utility_is_measured_on_the_holdout(story):
    """Text that the model wrote is held, unless there is no retain loss."""
    result = run(story, retain=None)
    check_forgotten(result, story)
    assert result.utility.measured_on == "holdout"
    assert all(record["retain_nll"] > 0 for record in result.history)
    assert "the model wrote" in result.notes[-1]
    alone = run(story, retain=None, retain_loss=None)
    assert {record["retain_nll"] for record in alone.history} == {None}
    assert not any("the model wrote" in note for note in alone.notes)


@pytest.mark.full
def test_a_gpt2_forgets_the_answers_in_a_jsonl_file(answers, tmp_path):
    """Questions are not scored; the tokenizer may lack a pad token."""
    paths = {}
    for role, rows in (
        ("forget", answers.forget + answers.unseen),
        ("retain", answers.corpus),
        ("holdout", answers.holdout),
    ):
        paths[role] = tmp_path / f"{role}.jsonl"
        paths[role].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert answers.tokenizer.pad_token is None
    result = run(answers, paths["forget"], retain=str(paths["retain"]), holdout=paths["holdout"])
    check_forgotten(result, answers)
    answer = answers.tokenizer(" " + answers.forget[0]["answer"])["input_ids"]
    assert abs(result.examples[0].tokens - len(answer) - 1) <= 1


@pytest.mark.full
def test_a_llama_forgets_chat_messages():
    """All turns are scored, as training did, in the form of the chat template."""
    chats = tiny.chatter()
    result = run(chats, chats.forget + chats.unseen, retain_weight=3.0)
    check_forgotten(result, chats)
    assert result.examples[0].text.endswith(chats.forget[0]["messages"][-1]["content"])


@pytest.mark.full
def test_a_t5_forgets_completions(t5):
    """The encoder reads the prompt; the decoder's completion is forgotten."""
    check_forgotten(run(t5, t5.forget + t5.unseen, retain_weight=4.0), t5)


@pytest.mark.slow
@pytest.mark.full
def test_a_t5_forgets_plain_texts():
    """The encoder reads the end-of-text token alone."""
    writer = tiny.writer()
    check_forgotten(run(writer, writer.forget + writer.unseen, retain_weight=10.0), writer)


@pytest.mark.parametrize("method", ["graddiff", "npo", *in_full("ga", "simnpo", "npo+nll", "simnpo+nll")])
def test_a_compound_method_trains_on_the_retain_set(story, method):
    """A plain name does the same by default, and does not with retain_loss=None."""
    result = run(story, method=method)
    check_forgotten(result, story)
    assert all(record["retain_nll"] > 0 for record in result.history)
    if "+" not in method and method != "graddiff":
        alone = run(story, method=method, retain_loss=None)
        check_forgotten(alone, story)
        assert {record["retain_nll"] for record in alone.history} == {None}


def test_unseen_texts_leave_the_weights_bit_for_bit(story):
    """Without a memorized example there is no step, and the result says why it ended."""
    result = run(story, story.unseen)
    assert result.stopped == "nothing memorized"
    assert result.passed
    assert not result.forgotten  # there was nothing to forget
    assert result.history == []
    assert {(e.verdict, e.steps) for e in result.examples} == {("not memorized", 0)}
    assert same(result.model, story.model)


def test_a_model_is_loaded_from_a_folder(story, tmp_path):
    """Model and tokenizer come from one folder, which is not changed; the run is that on the loaded model."""
    story.model.save_pretrained(tmp_path / "m")
    story.tokenizer.save_pretrained(tmp_path / "m")
    before = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    result = pyunlearn.unlearn(
        tmp_path / "m", story.forget, retain=story.corpus, holdout=story.holdout, learning_rate=3e-4, progress=False
    )
    check_forgotten(result, story)
    assert same(result.model, run(story, method="match").model)
    assert {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()} == before


# ---------------------------------------------------------------- which weights are trained


def test_a_bfloat16_model_forgets(story):
    """It stays a bfloat16 model."""
    result = run(story, model=story.fresh().bfloat16())
    check_forgotten(result, story)
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}
    assert not same(result.model, story.fresh().bfloat16())


def test_with_peft_the_adapters_alone_are_trained(story, tmp_path):
    """The base weights stay the same bits, the adapters are saved, and their default learning rate is higher."""
    config = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = peft.get_peft_model(story.fresh(), config)
    start = weights(model)
    result = run(story, model=model, method="wga", learning_rate=3e-3)
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
    """The bits of a parameter that requires no gradient do not change."""
    model = story.fresh()
    for p in model.model.embed_tokens.parameters():
        p.requires_grad_(False)
    result = run(story, model=model, max_steps=2)
    assert torch.equal(result.model.model.embed_tokens.weight, story.model.model.embed_tokens.weight)
    assert not same(result.model, story.model)


# ---------------------------------------------------------------- reproducibility


def test_the_same_seed_gives_the_same_run_bit_for_bit(story):
    """Weights, verdicts and history are equal, also with sampled non-members."""
    first, again = (run(story, retain=None, holdout=None, seed=3) for _ in range(2))
    assert same(first.model, again.model)
    assert timeless(first.history) == timeless(again.history)
    assert first.examples == again.examples
    assert first.utility == again.utility
    assert not same(first.model, story.model)
