"""The audit of models that are known to remember: verdicts, direct definitions, one pass for each text."""

import json
import math
import zlib

import numpy as np
import pytest
import tiny
import torch
from coverings import grid, in_full
from test_probes_teacher_forced import KINDS, counted, directly, made

import pyunlearn
from pyunlearn.auditing import METRICS
from pyunlearn.data import encode, read_examples
from pyunlearn.data.redaction import MASK, masked, recited
from pyunlearn.errors import ModelError
from pyunlearn.metrics import SIGNIFICANT, tpr_at_fpr

FAST = [name for name in METRICS if name != "continuations"]


@pytest.fixture(scope="module", params=["storyteller", "answerer", *in_full("chatter", "translator")])
def trained(request, one_thread):
    """Plain texts, questions, chats, and an encoder-decoder: models that have memorized two secrets."""
    return getattr(tiny, request.param)()


@pytest.fixture(scope="module")
def teller(one_thread):
    """A model of plain texts that has memorized two, and the same after unlearning them."""
    t = tiny.storyteller()
    result = pyunlearn.unlearn(
        t.fresh(),
        t.forget,
        retain=t.retain,
        holdout=t.holdout,
        tokenizer=t.tokenizer,
        learning_rate=3e-4,
        progress=False,
    )
    return t, result


# ---------------------------------------------------------------- what it says


def test_it_tells_memorized_from_unseen(trained):
    """Two secrets that were trained on often are still exposed, two of their kind that never were are not memorized."""
    audit = pyunlearn.audit(
        trained.model,
        trained.forget + trained.unseen,
        holdout=trained.holdout,
        tokenizer=trained.tokenizer,
        progress=False,
    )
    assert [e.verdict for e in audit.examples] == ["still exposed"] * 2 + ["not memorized"] * 2
    assert not audit.passed
    assert all(e.exposure >= SIGNIFICANT > u.exposure for e in audit.examples[:2] for u in audit.examples[2:])
    assert {m.score for m in audit.membership} == {"loss", "zlib", "min_k", "min_k_plus_plus"}
    assert pyunlearn.audit(
        trained.model, trained.unseen, holdout=trained.holdout, tokenizer=trained.tokenizer, metrics=[], progress=False
    ).passed


def test_what_it_writes_is_what_teacher_forcing_says(trained):
    """The greedy continuation is the true rest exactly where the extraction strength reaches that far.

    Secrets share longer runs than unseen texts.
    """
    audit = pyunlearn.audit(
        trained.model,
        trained.forget + trained.unseen,
        holdout=trained.holdout,
        tokenizer=trained.tokenizer,
        progress=False,
    )
    for e in audit.examples:
        given = 0 if e.prompt else e.tokens // 2
        assert (e.now.continuation == e.truth) == (e.now.extraction_strength >= 1 - given / e.tokens - 1e-9)
    runs = [e.now.longest_run for e in audit.examples]
    assert sum(runs[:2]) > sum(runs[2:])


def test_before_and_after_unlearning(teller):
    """With the original, the unlearned model's secrets are forgotten, as in the run's own result.

    Without it, they are merely not memorized.
    """
    t, result = teller
    assert result.forgotten
    options = {"holdout": t.holdout, "retain": t.retain, "tokenizer": t.tokenizer, "progress": False}
    before = pyunlearn.audit(t.model, t.forget + t.unseen, **options)
    after = pyunlearn.audit(result.model, t.forget + t.unseen, original=t.model, **options)
    alone = pyunlearn.audit(result.model, t.forget + t.unseen, **options)
    assert [e.verdict for e in before.examples] == ["still exposed"] * 2 + ["not memorized"] * 2
    assert [e.verdict for e in after.examples] == ["forgotten"] * 2 + ["not memorized"] * 2
    assert {e.verdict for e in alone.examples} == {"not memorized"}
    for e, of_run in zip(after.examples[:2], result.examples, strict=True):
        assert e.exposure == pytest.approx(of_run.exposure_after)
        assert e.exposure_before == pytest.approx(of_run.exposure_before)
        assert e.now.log_likelihood == pytest.approx(of_run.log_likelihood_after, abs=1e-5)
        assert e.before.exact_memorization == pytest.approx(of_run.greedy_match_before)
    assert after.change.estimate == pytest.approx(
        np.mean([e.now.log_likelihood - e.before.log_likelihood for e in after.examples])
    )
    assert after.utility.change.estimate == pytest.approx(
        after.utility.nll.estimate - after.utility.nll_before.estimate
    )
    assert after.membership[0].auc.estimate < after.membership[0].auc_before.estimate


def test_a_destroyed_model_is_over_unlearned_and_not_forgotten(teller):
    """Anchored exposure does not fall for a model that finds everything improbable."""
    t, _ = teller
    broken = t.fresh()
    with torch.no_grad():
        broken.lm_head.weight.neg_()
    audit = pyunlearn.audit(
        broken, t.forget, original=t.model, holdout=t.holdout, retain=t.retain, tokenizer=t.tokenizer, progress=False
    )
    assert {e.verdict for e in audit.examples} == {"over-unlearned"}
    assert not audit.passed
    assert audit.non_members.drift.low > 1
    assert audit.utility.change.low > 1


def test_a_retrained_reference_calibrates(teller):
    """PrivLeak is far below 0 against a model that never saw the secrets; a model is no reference for itself."""
    t, _ = teller
    torch.manual_seed(0)
    clean = tiny.tiny_llama(len(t.tokenizer))
    tiny.train(clean, t.tokenizer, tiny.sentences(800, 2), epochs=2)
    options = {
        "holdout": t.holdout,
        "reference_model": clean,
        "tokenizer": t.tokenizer,
        "metrics": FAST,
        "progress": False,
    }
    leaks = pyunlearn.audit(t.model, t.forget, **options).membership
    itself = pyunlearn.audit(clean, t.forget, **options).membership
    assert {m.score for m in leaks} == {"loss", "zlib", "min_k", "min_k_plus_plus", "reference"}
    assert next(m for m in leaks if m.score == "loss").privleak.estimate < -50
    assert {m.score: m.privleak for m in itself} == dict.fromkeys(("loss", "zlib", "min_k", "min_k_plus_plus"))


# ---------------------------------------------------------------- the numbers


def direct(model, t, side):
    """Every teacher-forced metric of one text by its definition, from the model's own logits in float64."""
    log_likelihood, rank, entropy, variance = (x.double().numpy() for x in directly(model, t, side))
    n, hit = len(rank), rank == 0
    shortest = next(k for k in range(n + 1) if hit[k:].all())
    z = (log_likelihood + entropy) / np.sqrt(np.maximum(variance, 1e-6))
    k = max(1, math.floor(0.4 * n))
    return {
        "nll": -log_likelihood.mean(), "exact": hit.mean(), "strength": 1 - shortest / n,
        "min_k": -np.sort(log_likelihood)[:k].mean(), "min_k_plus_plus": -np.sort(z)[:k].mean(),
    }  # fmt: skip


@grid(strength=1, kind=[*KINDS], side=["left", "right"])
def test_every_number_is_its_definition(kind, side):
    """On random models, with and without prompts, padded left or right, with eos = pad: one text at a time."""
    model, tokenizer, _ = made(kind)
    rows = KINDS[kind][1]
    forget = [*rows(5, 5), {"prompt": "so", "completion": "xyxyxy"}]
    holdout, retain = rows(19, 6), rows(4, 7)
    torch.manual_seed(1)
    original = made(kind)[0]
    with torch.no_grad():
        original.get_output_embeddings().weight.add_(0.3 * torch.randn_like(original.get_output_embeddings().weight))
    audit = pyunlearn.audit(
        model,
        forget,
        holdout=holdout,
        retain=retain,
        original=original,
        tokenizer=tokenizer,
        metrics=FAST,
        progress=False,
    )

    def tokens(source):
        both = kind == "encoder-decoder"
        return encode(read_examples(source, role="x"), tokenizer, role="x", max_length=None, encoder_decoder=both)

    now, then = ([direct(m, t, side) for t in tokens(forget)] for m in (model, original))
    unseen, unseen_then = ([direct(m, t, side) for t in tokens(holdout)] for m in (model, original))
    for i, e in enumerate(audit.examples):
        for side_, numbers, non_members in ((e.now, now[i], unseen), (e.before, then[i], unseen_then)):
            as_likely = sum(r["nll"] <= numbers["nll"] for r in non_members)
            assert side_.log_likelihood == pytest.approx(-numbers["nll"], rel=1e-4)
            assert side_.exact_memorization == pytest.approx(numbers["exact"])
            assert side_.extraction_strength == pytest.approx(numbers["strength"])
            assert side_.exposure == pytest.approx(math.log2(20 / (1 + as_likely)))
            assert side_.membership["loss"] == pytest.approx(numbers["nll"], rel=1e-4)
            assert side_.membership["min_k"] == pytest.approx(numbers["min_k"], rel=1e-4)
            assert side_.membership["min_k_plus_plus"] == pytest.approx(numbers["min_k_plus_plus"], rel=1e-3, abs=1e-3)
            assert side_.membership["zlib"] == pytest.approx(
                numbers["nll"] / len(zlib.compress(e.text.encode())), rel=1e-4
            )
        likelier = np.mean([r["nll"] for r in unseen]) < np.mean([r["nll"] for r in unseen_then]) - 0.1
        anchored = sum(r["nll"] <= now[i]["nll"] for r in (unseen if likelier else unseen_then))
        assert e.exposure == pytest.approx(math.log2(20 / (1 + anchored)))
        assert (e.now.answer_prior is None) == (not e.prompt)
    for m in (m for m in audit.membership if m.score in ("loss", "min_k")):
        name = "nll" if m.score == "loss" else "min_k"
        pairs = [(f[name] < h[name]) + 0.5 * (f[name] == h[name]) for f in now for h in unseen]
        assert m.auc.estimate == pytest.approx(np.mean(pairs))
        area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in zip(m.roc, m.roc[1:], strict=False))
        assert area == pytest.approx(m.auc.estimate)
    loss = next(m for m in audit.membership if m.score == "loss")
    for rate, fpr in ((loss.tpr_at_1_percent, 0.01), (loss.tpr_at_0_1_percent, 0.001)):
        lowest = min(h["nll"] for h in unseen)  # nineteen texts allow no false alarm
        assert rate.estimate == pytest.approx(np.mean([f["nll"] < lowest for f in now]))
        wanted = tpr_at_fpr([f["nll"] for f in now], [h["nll"] for h in unseen], fpr)
        np.testing.assert_array_equal(rate, wanted._replace(threshold=rate.threshold))  # the ends are NaN
        assert not rate.resolved
    utility = [direct(model, t, side)["nll"] for t in tokens(retain)]
    assert audit.utility.nll.estimate == pytest.approx(np.mean(utility), rel=1e-4)
    drift = np.mean([a["nll"] - b["nll"] for a, b in zip(unseen, unseen_then, strict=True)])
    assert audit.non_members.drift.estimate == pytest.approx(drift, abs=1e-4)


def test_the_answer_prior_is_the_same_answer_after_nothing():
    """A text's completion is scored after the beginning of text alone, by the definition."""
    model, tokenizer, _ = made("plain")
    row = {"prompt": "what does the cat keep?", "completion": "two stones"}
    audit = pyunlearn.audit(model, [row], holdout=tiny.pairs(19, 3), tokenizer=tokenizer, metrics=FAST, progress=False)
    answer = tokenizer(" two stones</s>", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([[0, *answer]])).logits[0].double().log_softmax(-1)
    alone = float(log_p[:-1].gather(1, torch.tensor(answer)[:, None]).mean())
    assert audit.examples[0].now.answer_prior == pytest.approx(audit.examples[0].now.log_likelihood - alone, abs=1e-4)
    assert audit.answer_prior.estimate == pytest.approx(audit.examples[0].now.answer_prior)


# ---------------------------------------------------------------- passes, cache


def test_one_pass_for_each_text_and_model(tmp_path):
    """Each model reads each text once for all teacher-forced metrics: counted at the model's own forward."""
    model, tokenizer, _ = made("plain")
    other = made("plain")[0]
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1  # or the cache would know that they are one model
    forget, holdout, retain = tiny.pairs(7, 1), tiny.pairs(19, 2), tiny.pairs(5, 3)
    seen = {"model": counted(model), "original": counted(other)}
    options = {
        "holdout": holdout,
        "retain": retain,
        "original": other,
        "tokenizer": tokenizer,
        "template": "none",  # auto reads forget texts in other forms too
        "metrics": FAST,
        "progress": False,
    }
    audit = pyunlearn.audit(model, forget, batch_size=4, cache=tmp_path, **options)
    tokens = encode(read_examples(forget + holdout + retain, role="x"), tokenizer, role="x", max_length=None)
    bare = [(0, *t.scored) for t in tokens[:7]]
    once = sorted({t.ids for t in tokens} | set(bare))
    longest = max(map(len, once))
    for (
        ids
    ) in seen.values():  # the first text of the first batch twice more: by the fused head and by the model's own logits
        for _ in range(2):
            ids.remove(next(i for i in ids if len(i) == longest and ids.count(i) > 1))
        assert sorted(ids) == once
        ids.clear()
    assert audit.passes == {"original": len(once), "model": len(once)}
    pyunlearn.audit(model, forget, batch_size=4, cache=tmp_path, **options)
    assert seen == {"model": [], "original": []}


class Stopped(BaseException):
    """As Ctrl-C."""


@pytest.mark.parametrize("at", [1, 5, 8, *in_full(3, 6, 10)])
def test_an_interrupted_audit_resumes(tmp_path, monkeypatch, at):
    """Stopped anywhere (scoring with the original or the model, decoding), the same call ends with the same numbers."""
    t = made("plain")
    options = {"original": made("plain")[0], "tokenizer": t[1], "progress": False, "batch_size": 24}
    whole = pyunlearn.audit(t[0], tiny.sentences(24, 1), **options)
    done = 0

    def advance(self, texts):
        nonlocal done
        done += 1
        if done == at:
            raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr("pyunlearn.progress.Progress.advance", advance)
        with pytest.raises(Stopped):
            pyunlearn.audit(t[0], tiny.sentences(24, 1), cache=tmp_path, **options)
    assert list(tmp_path.rglob("*.safetensors"))
    again = pyunlearn.audit(t[0], tiny.sentences(24, 1), cache=tmp_path, **options)
    drop = {"seconds": 0}
    assert json.dumps(again.to_dict(show_text=True) | drop) == json.dumps(whole.to_dict(show_text=True) | drop)


def test_the_model_is_left_as_it_was(teller):
    """Weights, training mode, generation config."""
    t, _ = teller
    model = t.fresh().train()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    config = model.generation_config
    pyunlearn.audit(model, t.forget, tokenizer=t.tokenizer, progress=False)
    assert model.training
    assert model.generation_config is config
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_it_says_where_membership_scores_tell_the_set_from_the_holdout(teller):
    """Texts of another kind, none of them likelier: the verdicts pass, and a note names the score.

    There is none among equals, nor of copies, which depend on each other.
    """
    t, _ = teller
    options = {"tokenizer": t.tokenizer, "metrics": ["membership"], "template": "none", "progress": False}
    equal = tiny.distinct_facts(60, 4)
    other = [row | {"answer": " ".join(reversed(row["answer"].split()))} for row in equal[:8]]
    notes = []
    for texts in (equal[:8], other, other[:4] * 3):
        audit = pyunlearn.audit(t.model, texts, holdout=equal[8:], **options)
        assert audit.passed
        notes.append([note for note in audit.notes if note.startswith("As a set, ")])
    assert (notes[0], notes[2]) == ([], [])
    (note,) = notes[1]
    assert "look less trained-on than the holdout" in note
    assert "for the best of 4" in note


# ---------------------------------------------------------------- text, mistakes


def test_without_a_holdout_no_attack_is_reported(teller):
    """With text of another source, as sampled text is, an attack would measure the difference of the sources."""
    t, _ = teller
    options = {"tokenizer": t.tokenizer, "metrics": FAST, "progress": False}
    audit = pyunlearn.audit(t.model, t.forget, **options)
    assert audit.non_members.source == "self-sampled"
    assert audit.membership == []
    assert all(e.now.membership == {} for e in audit.examples)
    assert pyunlearn.audit(t.model, t.forget, holdout=t.holdout, **options).membership


def test_texts_are_masked_unless_asked_for(teller):
    """No word of a forget text is in the data by default; with show_text all are. Masking shows no length."""
    t, _ = teller
    audit = pyunlearn.audit(t.model, t.forget, tokenizer=t.tokenizer, progress=False)
    hidden, shown = json.dumps(audit.to_dict()), json.dumps(audit.to_dict(show_text=True))
    json.loads(hidden, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    for text in t.forget:
        assert text in shown
        assert not [word for word in text.strip(".").split() if len(word) > 3 and f"{word} " in hidden]
    assert masked("pin 4711\nkey") == f"{MASK} {MASK}\n{MASK}"
    assert masked("pin 47") == masked("pin 4711")


def test_recited_words_are_runs_in_the_true_order():
    """Two in a row count, one alone does not."""
    marks = recited("so the cat sat and the dog", "look the cat sat on a dog")
    assert [word for word, hit in marks if hit] == ["the", "cat", "sat"]
    assert recited("", "a b") == []


def test_a_broken_model_is_told_so():
    """NaN is no verdict."""
    model, tokenizer, _ = made("plain")
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(ModelError, match="NaN or Inf"):
        pyunlearn.audit(model, tiny.sentences(3, 1), holdout=tiny.sentences(19, 2), tokenizer=tokenizer, progress=False)


@pytest.mark.full
def test_a_budget_is_spent_on_texts_that_are_likely_recited(teller):
    """Of 40 texts two are secrets: a budget of four decodes both, with both models; all are scored and judged."""
    t, _ = teller
    texts = tiny.sentences(38, 77)
    texts[11:11] = t.forget
    options = {"tokenizer": t.tokenizer, "holdout": t.holdout, "batch_size": 2, "progress": False}
    audit = pyunlearn.audit(t.model, texts, original=t.model, budget=4, **options)
    written = [e.index for e in audit.examples if e.now.continuation is not None]
    assert len(written) == 4
    assert {11, 12} <= set(written)
    assert [e.index for e in audit.examples if e.before.continuation is not None] == written
    whole = pyunlearn.audit(t.model, texts, original=t.model, **options)
    assert [e.verdict for e in whole.examples] == [e.verdict for e in audit.examples]
    assert all(e.now.continuation is not None for e in whole.examples)
    for i in written:
        assert audit.examples[i].now == whole.examples[i].now
