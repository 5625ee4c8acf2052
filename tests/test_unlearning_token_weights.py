"""Token weights of the forget set, against plain loops over the model's own logits."""

from contextlib import nullcontext

import numpy as np
import pytest
import tiny
import torch
from coverings import in_full

import pyunlearn
from pyunlearn.data import Tokens, encode, read_examples
from pyunlearn.errors import ArgumentError, DataError, TrainingError
from pyunlearn.methods import METHODS
from pyunlearn.unlearning import objectives
from pyunlearn.unlearning.token_weights import importance, scaled, token_weights_of

WEIGHTED = [name for name, method in METHODS.items() if method.weighted]
LEAST = ["ga", "dpo", "tnpo", "flat"]  # one for each kind


@pytest.fixture(scope="module")
def story(one_thread):
    return tiny.trained(tiny.tiny_llama, tiny.facts, count=120, repeats=16, epochs=6)


@pytest.fixture(scope="module")
def other(story):
    """Return a reference model that has read no text."""
    torch.manual_seed(1)
    return tiny.tiny_llama(len(story.tokenizer)).eval()


def run(story, method="ga", forget=None, **options):
    options = {"max_steps": 1, "learning_rate": 1e-4, "progress": False, "holdout": story.holdout, **options}
    forget = story.forget if forget is None else forget
    if METHODS[method].roles[0] == "winner":
        options["method_options"] = {"winners": ["a lamp."] * len(forget)}
    return pyunlearn.unlearn(story.fresh(), forget, tokenizer=story.tokenizer, method=method, **options)


def tokens_of(story, rows):
    return encode(read_examples(rows, role="x"), story.tokenizer, role="x", max_length=None)


def each(model, t, ids=None):
    """Return (T,) log-likelihoods of the scored tokens, or of `ids` in their place."""
    ids = t.ids if ids is None else ids
    with torch.no_grad():
        rows = torch.log_softmax(model(torch.tensor([ids])).logits[0, t.first - 1 : -1].double(), -1)
    return rows.gather(1, torch.tensor(ids[t.first :])[:, None])[:, 0].numpy()


def weights_like(tokens, seed=0):
    r = np.random.default_rng(seed)
    return [r.uniform(0, 2, len(t.scored)).round(2).tolist() for t in tokens]


@pytest.mark.full
@pytest.mark.parametrize(
    ("method", "reference"),
    [(method, "itself") for method in ("ga", "simnpo", "hinge", "wga", "satimp")]
    + [("npo", "other"), ("dpo", "other"), ("tnpo", "other"), ("wtnpo", "other")]
    + in_full(("npo", "itself"), ("dpo", "itself"), ("tnpo", "itself"), ("wtnpo", "itself")),
)
def test_weights_are_factors_on_the_forget_text_s_log_likelihoods(story, other, method, reference):
    """The first loss is each method's formula on weighted log-likelihoods of model and reference, from plain logits."""
    tokens = tokens_of(story, story.forget)
    weights = weights_like(tokens)
    model = story.model if reference == "itself" else other
    result = run(story, method, token_weights=weights, reference_model=None if reference == "itself" else other)
    losses = []
    winners = tokens_of(story, [row | {"answer": "a lamp."} for row in story.forget])
    for t, w, winner in zip(tokens, map(np.array, weights), winners, strict=True):
        x, r = each(story.model, t), each(model, t)
        won = each(story.model, winner).sum() - each(model, winner).sum()
        p, q, n = np.exp(x), np.exp(r), len(x)
        losses.append(
            {
                "ga": (w * x).sum() / n,
                "npo": 20 * np.log1p(np.exp(0.1 * (w * (x - r)).sum())),
                "simnpo": 0.8 * np.log1p(np.exp(2.5 * (w * x).sum() / n)),
                "hinge": max(0.0, 6 * n + (w * x).sum()),
                "dpo": 20 * np.log1p(np.exp(-0.1 * (won - (w * (x - r)).sum()))),
                "wga": (w * p * x).mean(),
                "tnpo": (w * 2 * p**4 / (p**4 + q**4) * x).mean(),
                "wtnpo": (w * 2 * p**5.5 / (p**4 + q**4) * x).mean(),
                "satimp": (w * p**5 * (1 - p) * x).mean(),
            }[method]
        )
    assert result.history[0]["forget_loss"] == pytest.approx(np.mean(losses), rel=2e-4)


@pytest.mark.parametrize("method", [*LEAST, *in_full(*sorted({*WEIGHTED} - {*LEAST}))])
def test_weights_of_one_change_nothing_and_of_zero_give_no_gradient(story, method, monkeypatch):
    """This holds for every method that takes weights; the loop scales the loss of a pair or a token without weights."""
    ones = [[1.0] * len(t.scored) for t in tokens_of(story, story.forget)]
    with monkeypatch.context() as patch:
        patch.setattr(
            objectives, "stopped_by_token", lambda function, *_, **__: lambda *tensors: function(*tensors[:-2])
        )
        plain = run(story, method)
    same = run(story, method, token_weights=ones)
    assert same.history[0]["forget_loss"] == pytest.approx(plain.history[0]["forget_loss"], rel=1e-6)
    norms = [record["gradient_norm"] / record["forget_weight"] for record in (same.history[0], plain.history[0])]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    none = [[0.0] * len(w) for w in ones]
    alone = METHODS[method].roles == ("forget",)
    with pytest.raises(TrainingError, match=r"no gradient.*the token weights") if alone else nullcontext():
        run(story, method, token_weights=none)


def test_flat_weighs_the_forget_text_s_probabilities_and_not_the_refusal_s(story):
    """Q is the mean of w p over the text's tokens, P the mean over the refusal's, whose weights are 1."""
    tokens = tokens_of(story, story.forget)
    refusal = [row | {"answer": "I know nothing."} for row in story.forget]
    weights = weights_like(tokens)
    with_refusals = {"method_options": {"refusals": ["I know nothing."]}}
    result = run(story, "flat", token_weights=weights, **with_refusals)
    right = [
        -np.exp(each(story.model, refused)).mean() + np.exp((np.array(w) * np.exp(each(story.model, t))).mean() - 1)
        for refused, t, w in zip(tokens_of(story, refusal), tokens, weights, strict=True)
    ]
    assert result.history[0]["forget_loss"] == pytest.approx(np.mean(right), rel=1e-4)


def test_importance_is_the_loss_of_the_rest_of_the_text_when_a_token_is_masked(story):
    """Against a loop that masks one token after the other and reads the whole text again; the last token has 0."""
    tokens = tokens_of(story, story.forget)
    deltas = importance(tokens, lambda some: [each(story.model, t) for t in some], mask_id=7, seed=0)
    for t, delta in zip(tokens, deltas, strict=True):
        whole = each(story.model, t)
        for at in range(len(t.scored)):
            index = t.first + at
            ids = (*t.ids[:index], 7, *t.ids[index + 1 :])
            rest = slice(at + 1, None)
            right = max(0.0, whole[rest].sum() - each(story.model, t, ids)[rest].sum())
            assert delta[at] == pytest.approx(right, abs=1e-9)
        assert delta[-1] == 0
        assert delta.max() > 0.1


def test_a_token_is_masked_by_another_one_of_the_forget_set(story):
    """Without a mask token another token of the forget set is drawn from the seed; few copies are made at a time."""
    tokens, seen = tokens_of(story, story.forget), []

    def score(some):
        seen.append(list(some))
        return [each(story.model, t) for t in some]

    first = importance(tokens, score, mask_id=None, seed=3)
    np.testing.assert_equal(
        importance(tokens, lambda some: [each(story.model, t) for t in some], mask_id=None, seed=3), first
    )
    pool = {i for t in tokens for i in t.scored}
    copies = iter(seen[1])
    for t in tokens:
        for at in range(len(t.scored) - 1):
            copy, index = next(copies), t.first + at
            assert copy.first == index + 1
            assert copy.ids[index] != t.ids[index]
            assert copy.ids[index] in pool
            assert copy.ids[:index] + copy.ids[index + 1 :] == t.ids[:index] + t.ids[index + 1 :]
    short = Tokens((5, 6), 1)
    (alone,) = importance([short], lambda some: [np.zeros(len(t.scored)) for t in some], mask_id=None, seed=0)
    assert alone.tolist() == [0.0]


def test_computed_weights_have_mean_one_and_the_smallest_are_zero():
    """The first of equal weights count; a text without a weight above 0 is weighted evenly."""
    w = [np.array([0.0, 3.0, 1.0, 2.0]), np.zeros(3), np.array([1.0, 1.0, 1.0])]
    whole, half = scaled(w, 1.0), scaled(w, 0.5)
    np.testing.assert_allclose(whole[0], [0, 2, 2 / 3, 4 / 3])
    np.testing.assert_allclose(half[0], [0, 2.4, 0, 1.6])
    np.testing.assert_allclose(whole[1], 1)
    np.testing.assert_allclose(half[2], [1.5, 1.5, 0])
    assert all(x.mean() == pytest.approx(1) for x in whole + half)


def test_the_caller_s_own_weights_are_not_scaled(story):
    """A share leaves the largest ones as they are; a text whose weights are all 0 is not unlearned."""
    (t, *_) = tokens_of(story, story.forget)
    n = len(t.scored)
    own, zeros = np.arange(n) / 10, np.zeros(n)
    for share, smallest in ((1.0, 0), (0.5, n // 2)):
        weights = token_weights_of([own, zeros], share, [t, t], None, None, seed=0)
        np.testing.assert_array_equal(weights[0], np.where(np.arange(n) >= smallest, own, 0))
        assert not weights[1].any()


def test_a_run_weighs_tokens_by_their_likelihood_beyond_a_reference_model(story, other):
    """The first loss of ascent is the mean of w log p, w in proportion to max(0, log p - log q)."""
    tokens = tokens_of(story, story.forget)
    for share in (1.0, 0.4):
        right = []
        for t in tokens:
            x = each(story.model, t)
            (w,) = scaled([np.maximum(x - each(other, t), 0)], share)
            right.append((w * x).mean())
        result = run(story, token_weights="reference", token_share=share, reference_model=other)
        assert result.history[0]["forget_loss"] == pytest.approx(np.mean(right), rel=1e-4)


@pytest.mark.full
@pytest.mark.parametrize(("method", "share"), [("tnpo", 0.5), *in_full(("wga", 1.0))])
def test_secrets_are_forgotten_by_their_important_tokens(story, method, share):
    """Weighted by importance, all or half of the tokens are enough to forget the whole text within the budget."""
    how = {"token_weights": "importance", "token_share": share, "max_steps": 60, "retain": story.corpus}
    result = run(story, method, **how)
    assert result.stopped == "forgotten"
    assert all(e.forgotten for e in result.examples)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "idk", "token_weights": "importance"}, "method 'idk' reads none: choose from match, ga, npo"),
        (
            {"token_weights": "loss"},
            "must be 'importance', 'reference' or a list of numbers for each forget example, got 'loss'",
        ),
        ({"token_weights": "reference"}, "pass reference_model="),
        ({"token_weights": [[1.0]]}, "must be 2 lists, one for each forget example, got 1"),
        (
            {"token_weights": [[1.0], [1.0]]},
            r"of forget example 1 must be \d+ numbers, 0 or more, one for each of its scored tokens",
        ),
        ({"token_share": 0.5}, "token_share keeps the tokens of the largest weight: pass token_weights="),
        (
            {"token_weights": "importance", "token_share": 0.0},
            "token_share must be a number, above 0 and at most 1, got 0.0",
        ),
        (
            {"method": "npo", "batch_reduction": "token"},
            r"methods whose loss is a mean over the tokens of a text \(match, ga, .*\), and that of 'npo' is none",
        ),
        (
            {"method": "ga", "batch_reduction": "token", "method_options": {"top_fraction": 0.5}},
            "is the mean over all tokens of a step, and top_fraction leaves some out: leave one of them out",
        ),
        ({"order": "hardest"}, "order must be one of random, easy_first, hard_first, got 'hardest'"),
        ({"order": "easy_first", "difficulty": "mrd"}, "difficulty must be 'nll', 'ksd' or a list"),
        ({"order": "easy_first", "difficulty": "ksd"}, "pass some of it as retain="),
        ({"order": "easy_first", "difficulty": [1.0]}, "difficulty must be 2 numbers, one for each forget example"),
    ],
)
def test_wrong_token_weights_reductions_and_orders_are_refused(story, options, message):
    """One sentence that says which values are allowed."""
    with pytest.raises(ArgumentError, match=message) as error:
        run(story, **options)
    assert "\n" not in str(error.value)


@pytest.mark.full
def test_a_checkpoint_of_other_token_weights_is_refused(story, tmp_path, monkeypatch):
    """Weights and difficulties are part of a checkpoint's fingerprint; a run with the same ones resumes."""
    tokens = tokens_of(story, story.forget)
    options = {"max_steps": 3, "batch_size": 1, "output_dir": tmp_path / "out", "token_weights": weights_like(tokens)}
    calls = []

    def loss(forget, lengths, **_):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return forget / lengths

    with monkeypatch.context() as patch:
        patch.setitem(METHODS, "ga", tiny.with_loss("ga", loss))
        assert run(story, **options).stopped == "interrupted"
    for changes in ({"token_weights": weights_like(tokens, 1)}, {"token_weights": None}):
        with pytest.raises(DataError, match="another model or token weights"):
            run(story, **options | changes, resume=True)
    with pytest.raises(DataError, match="order='random', not 'easy_first'"):
        run(story, **options | {"order": "easy_first"}, resume=True)
    assert run(story, **options, resume=True).stopped in ("max_steps", "forgotten")
