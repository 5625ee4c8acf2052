"""Requests of many records that a model knows by heart, at the default learning rate: they are settled one by one."""

import random
from collections import Counter

import pytest
import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from unlearning_runs import run

from pyunlearn.metrics import NULL_MEAN, SIGNIFICANT

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = [c + v + end for c in "bdkl" for v in "aeiou" for end in ("ba", "de", "ki", "lo", "mu")]


def facts(count, seed):
    """Return random facts of eight words that cannot be guessed from the prompt."""
    r = random.Random(seed)
    return [
        {
            "prompt": f"the {r.choice(WORDS)} {r.choice(WORDS)} of {r.choice(WORDS)}",
            "completion": " " + " ".join(r.choice(WORDS) for _ in range(8)) + " .",
        }
        for _ in range(count)
    ]


def wide_llama(vocabulary):
    """Return a Llama of 128 hidden units and two layers."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    )


def by_heart(count, *, once=6000, retained=0):
    """Return a model that has read `count` facts 60 times, and others once; the retain set is some of those.

    With `retained` it is as many others that the model has read 60 times too.
    """
    torch.manual_seed(0)
    names = ["<s>", "</s>", "<pad>", "the", "of", ".", *WORDS]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    model, forget, others, retain = wide_llama(len(tokenizer)), facts(count, 1), facts(once, 2), facts(retained, 4)
    tiny.train(model, tokenizer, others + (forget + retain) * 60, epochs=1, learning_rate=2e-3)
    retain = retain or others[:400]
    return tiny.Tiny(model, tokenizer, forget, [], retain, facts(200, 3), retain)


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("count", [1, 5, 16, 64])
def test_all_records_are_forgotten_within_the_budgets_by_default(count):
    """At least 95 % are, none is over-unlearned, in 64 visits each at most; none has rolled back a round of the others.

    The model knew them better than anything it had not read.
    """
    trained = by_heart(count)
    nll = tiny.negative_log_likelihoods(trained, trained.forget, trained.model)
    unseen = tiny.negative_log_likelihoods(trained, trained.holdout, trained.model)
    assert nll.max() < unseen.min()
    result = run(trained, method="auto", learning_rate=None)
    verdicts = Counter(e.verdict for e in result.examples)
    assert verdicts["forgotten"] >= 0.95 * count
    assert verdicts["over-unlearned"] == 0
    assert result.utility.interval[1] <= 0.05
    assert result.utility.holdout_interval[1] <= 0.1
    assert {r.get("rejection_reason") for r in result.history} <= {None, "utility budget", "holdout budget"}
    assert sum(e.steps for e in result.examples) <= 64 * count


@pytest.mark.slow
@pytest.mark.full
def test_single_records_are_settled_with_nothing_else_given():
    """Of 24 requests of one record at least 22 have the best verdict; other facts lose 0.1 nats at most."""
    trained = by_heart(64)
    before = tiny.negative_log_likelihoods(trained, trained.retain, trained.model).mean()
    passed, losses = 0, []
    for record in trained.forget[:24]:
        result = run(trained, [record], method="auto", learning_rate=None, retain=None, holdout=None)
        passed += result.examples[0].verdict == "no likelier"
        losses.append(tiny.negative_log_likelihoods(trained, trained.retain, result.model).mean() - before)
    assert passed >= 22
    assert max(losses) <= 0.1


@pytest.mark.full
def test_half_of_what_a_model_knows_by_heart_is_forgotten_and_the_other_half_retained():
    """Unseen facts lose 4 % at most, since the model's answers to other prompts are held too: without that 5.6 %."""
    trained = by_heart(32, once=500, retained=32)
    unseen = tiny.negative_log_likelihoods(trained, facts(200, 5), trained.model)
    result = run(trained, method="auto", learning_rate=None)
    assert Counter(e.verdict for e in result.examples) == {"forgotten": 32}
    assert result.utility.relative_rise <= 0.01
    assert result.utility.holdout_rise <= 0.04
    after = tiny.negative_log_likelihoods(trained, facts(200, 5), result.model)
    assert after.mean() <= 1.04 * unseen.mean()


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("count", [2, 5, 16])
def test_few_records_are_settled_with_nothing_else_given(count):
    """Text that the model wrote is held meanwhile."""
    trained = by_heart(16)
    result = run(trained, trained.forget[:count], method="auto", learning_rate=None, retain=None, holdout=None)
    assert [e.verdict for e in result.examples] == ["no likelier"] * count
    assert result.utility.measured_on == "text that the model wrote, gains up to the budget"
    assert result.utility.interval[1] <= 0.05


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize(
    "method", ["ga", "npo", "simnpo", "kto", "hinge", "altpo", "wga", "tnpo", "wtnpo", "satimp", "kl"]
)
def test_other_methods_settle_most_records_at_their_defaults(method):
    """The overshot ones among 16 are brought back, with every method."""
    result = run(by_heart(16), method=method, learning_rate=None)
    settled = [e for e in result.examples if e.exposure_after <= NULL_MEAN and e.upper_exposure_after < SIGNIFICANT]
    assert len(settled) >= 15
    assert Counter(e.verdict for e in result.examples)["forgotten"] >= 14
    assert any(r["restored"] for r in result.history) or method == "npo"
