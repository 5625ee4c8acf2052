"""Teacher-forced statistics: they equal those of the model's own logits, at one forward pass for each text."""

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyunlearn.data import Tokens, encode, read_examples
from pyunlearn.errors import OutputError
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.probes import greedy_continuations, teacher_forced, without_prompt
from pyunlearn.probes.cache import Cache, weights_digest
from pyunlearn.probes.decoding import FIELDS as DECODED
from pyunlearn.probes.decoding import sampled_continuations
from pyunlearn.probes.teacher_forced import FIELDS

KINDS = {
    "plain": (tiny.tiny_llama, tiny.sentences, {}),
    "no pad token": (tiny.tiny_gpt2, tiny.facts, {"form": "$A", "pad": False}),  # so padding is the end of text
    "chat": (tiny.tiny_llama, tiny.chats, {"chat": True}),
    "encoder-decoder": (tiny.tiny_t5, tiny.pairs, {"form": "$A </s>"}),
}


def made(kind):
    """A small random model, its tokenizer and twelve texts of many lengths."""
    make, rows, options = KINDS[kind]
    torch.manual_seed(0)
    tokenizer = tiny.make_tokenizer(**options)
    model = make(len(tokenizer)).eval()
    with torch.no_grad():  # far from uniform, so that ranks and choices mean something
        for p in model.parameters():
            p.mul_(3 if p.dim() > 1 else 1)
    texts = [*rows(8, 5), *({"prompt": "so", "completion": "x" * n} for n in (3, 9, 20))]
    both = kind == "encoder-decoder"
    tokens = encode(
        read_examples(texts, role="forget"), tokenizer, role="forget", max_length=None, encoder_decoder=both
    )
    return model, tokenizer, tokens


def directly(model, t, side):
    """(log-likelihood, rank, entropy, variance) of each scored token of one text, padded on `side`.

    From the model's own logits in float64.
    """
    pads = 5
    written = torch.tensor(t.scored)
    with torch.no_grad():
        if t.decoder is not None:
            start = model.config.decoder_start_token_id
            out = model(input_ids=torch.tensor([t.ids]), decoder_input_ids=torch.tensor([[start, *t.decoder[:-1]]]))
            z = out.logits[0, t.first :]
        else:
            ids = [0] * pads + list(t.ids) if side == "left" else list(t.ids) + [0] * pads
            mask = torch.tensor([[0] * pads + [1] * len(t.ids) if side == "left" else [1] * len(t.ids) + [0] * pads])
            position = (mask.cumsum(1) - 1).clamp(min=0)
            z = model(input_ids=torch.tensor([ids]), attention_mask=mask, position_ids=position).logits[0]
            begin = pads * (side == "left")
            z = z[begin + t.first - 1 : begin + len(t.ids) - 1]
    p = z.double().softmax(-1)
    log_p = p.log()
    mean = (p * log_p).sum(1)
    mine = z.gather(1, written[:, None])
    return (
        log_p.gather(1, written[:, None])[:, 0],
        (z > mine).sum(1),
        -mean,
        (p * (log_p - mean[:, None]) ** 2).sum(1),
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_gives_what_the_model_s_own_logits_give(kind, side):
    """With and without prompts, padded left or right, with eos = pad: token by token, one text at a time."""
    model, tokenizer, tokens = made(kind)
    forced = teacher_forced(LanguageModel.of(model, tokenizer), tokens, batch_size=5)
    assert forced.counts.tolist() == [len(t.scored) for t in tokens]
    each = [forced.each(getattr(forced, name)) for name in FIELDS]
    for i, t in enumerate(tokens):
        log_likelihood, rank, entropy, variance = directly(model, t, side)
        np.testing.assert_allclose(each[0][i], log_likelihood, rtol=1e-4, atol=1e-4)
        assert each[1][i].tolist() == rank.tolist()
        np.testing.assert_allclose(each[2][i], entropy, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(each[3][i], variance, rtol=1e-3, atol=1e-3)
        assert forced.mean_log_likelihood[i] == pytest.approx(float(log_likelihood.mean()), rel=1e-4)
        assert forced.greedy_match[i] == pytest.approx(float((rank == 0).double().mean()))


def counted(model):
    """Every text that the model computes from now on, without its padding."""
    seen = []

    def look(_, __, inputs):
        for ids, mask in zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True):
            seen.append(tuple(i for i, m in zip(ids, mask, strict=True) if m))

    model.register_forward_pre_hook(look, with_kwargs=True)
    return seen


def test_each_text_is_computed_once():
    """At every batch size, and a text that occurs twice as well.

    A model's first batch costs more: one text is computed two ways to check the fast path.
    """
    model, _tokenizer, tokens = made("plain")
    lm = LanguageModel.of(model, needs_tokenizer=False)
    teacher_forced(lm, tokens[:1])
    seen = counted(model)
    for size in (1, 4, 100):
        seen.clear()
        teacher_forced(lm, [*tokens, tokens[3]], batch_size=size)
        assert sorted(seen) == sorted(t.ids for t in tokens)


def test_training_mode_is_put_back_and_dropout_is_off():
    """A model in training mode gives the log-likelihoods of evaluation mode, and is in training mode afterwards."""
    model, _tokenizer, tokens = made("no pad token")
    calm = teacher_forced(model, tokens)
    model.train()
    again = teacher_forced(model, tokens)
    assert model.training
    np.testing.assert_array_equal(calm.log_likelihood, again.log_likelihood)


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_together_is_decoding_alone(kind):
    """Greedy continuations of prompts of many lengths are the argmax, token by token, of each prompt alone."""
    model, tokenizer, tokens = made(kind)
    model.generation_config.repetition_penalty = 5.0  # a model's own settings stay out
    model.generation_config.do_sample = True
    decoded = greedy_continuations(model, tokens, tokenizer=tokenizer, longest=6, batch_size=4)
    eos = tokenizer.eos_token_id
    for t, ids in zip(tokens, decoded, strict=True):
        expected = []
        while len(expected) < min(6, len(t.scored)) and eos not in expected:
            with torch.no_grad():
                if t.decoder is not None:
                    so_far = [model.config.decoder_start_token_id, *t.decoder[: t.first], *expected]
                    z = model(input_ids=torch.tensor([t.ids]), decoder_input_ids=torch.tensor([so_far])).logits
                else:
                    z = model(input_ids=torch.tensor([[*t.ids[: t.first], *expected]])).logits
            expected.append(int(z[0, -1].argmax()))
        assert list(ids) == expected
    assert model.generation_config.repetition_penalty == 5.0


def test_decoding_beyond_the_text_ends_with_the_context():
    """As many tokens as are wanted, however short the text, and no more than the context has room for.

    The room is that after the text's own prompt, not after the longest that is decoded with it.
    """
    model, tokenizer, tokens = made("plain")
    lm = LanguageModel.of(model, tokenizer)
    ends = (tokenizer.eos_token_id, None)
    for longest in (5, 10**6):
        room = [min(longest, lm.context_length - t.first) for t in tokens]
        written = greedy_continuations(lm, tokens, longest=longest, beyond=True, batch_size=4)
        assert all(len(ids) == n or ids[-1] in ends for ids, n in zip(written, room, strict=True))
        assert any(len(ids) > len(t.scored) for ids, t in zip(written, tokens, strict=True))
    within = greedy_continuations(lm, tokens, longest=5, batch_size=1)
    beyond = greedy_continuations(lm, tokens, longest=5, beyond=True, batch_size=1)
    assert all(long[: len(short)] == short for short, long in zip(within, beyond, strict=True))


def test_no_prompt_is_continued_beyond_the_context_with_others():
    """One that fills the context, next to a short one with a long text: a GPT-2 has no position after the last."""
    model = tiny.tiny_gpt2(400).eval()
    lm = LanguageModel.of(model, tiny.make_tokenizer(form="$A", pad=False))
    ids = tuple(range(5, 5 + lm.context_length))
    texts = [Tokens(ids, first=lm.context_length - 2), Tokens(ids[::-1], first=10)]
    for beyond in (False, True):
        alone = [greedy_continuations(lm, [t], beyond=beyond)[0] for t in texts]
        assert greedy_continuations(lm, texts, beyond=beyond) == alone
    drawn = sampled_continuations(lm, texts, count=2)
    assert max(map(len, drawn[0])) <= 2 < max(map(len, drawn[1]))


def test_an_interrupted_run_resumes(tmp_path):
    """Stopped anywhere, it computes what is left and ends with the same bits; a finished one computes nothing."""
    model, _tokenizer, tokens = made("plain")
    lm = LanguageModel.of(model, needs_tokenizer=False)
    whole = teacher_forced(lm, tokens, batch_size=3)

    class Stopped(Exception):
        pass

    def stop_at(number):
        def advance(_):
            nonlocal number
            number -= 1
            if number == 0:
                raise Stopped

        return advance

    seen = counted(model)
    for batch in (1, 2, 3):
        with pytest.raises(Stopped):
            teacher_forced(
                lm, tokens, batch_size=3, store=Cache(tmp_path, model).store("a", FIELDS),
                advance=stop_at(batch),
            )  # fmt: skip
    assert len(seen) == 9
    resumed = teacher_forced(lm, tokens, batch_size=3, store=Cache(tmp_path, model).store("a", FIELDS))
    assert sorted(seen) == sorted(t.ids for t in tokens)
    again = teacher_forced(lm, tokens, batch_size=3, store=Cache(tmp_path, model).store("a", FIELDS))
    assert len(seen) == len(tokens)
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(resumed, name), getattr(whole, name))
        np.testing.assert_array_equal(getattr(again, name), getattr(whole, name))


def test_continuations_are_cached_too(tmp_path):
    """By their length as well."""
    model, tokenizer, tokens = made("chat")

    def decode(**options):
        store = Cache(tmp_path, model).store("c", DECODED)
        return greedy_continuations(model, tokens, tokenizer=tokenizer, store=store, **options)

    first = decode()
    model.generate = None
    assert first == decode()
    with pytest.raises(TypeError):
        decode(longest=2)


def test_a_damaged_shard_is_computed_again(tmp_path):
    """And nothing half-written is ever taken for a shard."""
    model, _tokenizer, tokens = made("plain")
    whole = teacher_forced(model, tokens, store=Cache(tmp_path, model).store("a", FIELDS))
    (shard,) = tmp_path.rglob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:100])
    (shard.parent / ".x.safetensors.partial-1").write_bytes(b"half")
    again = teacher_forced(model, tokens, store=Cache(tmp_path, model).store("a", FIELDS))
    np.testing.assert_array_equal(whole.log_likelihood, again.log_likelihood)


def test_the_cache_tells_models_apart():
    """One weight, one field of the configuration, the dtype: each changes the key; a copy and another name do not."""
    model = made("plain")[0]
    key = weights_digest(model)
    other = made("plain")[0]
    other.config._name_or_path = "elsewhere"
    assert weights_digest(other) == key
    other.config.rms_norm_eps = 1e-3
    assert weights_digest(other) != key
    other = made("plain")[0]
    assert weights_digest(other.bfloat16()) != key
    with torch.no_grad():
        model.lm_head.weight[3, 4] += 1e-3
    assert weights_digest(model) != key


def test_the_cache_tells_adapters_apart():
    """The same weights with another adapter active, with none, or with another factor on it are other models."""
    peft = pytest.importorskip("peft")
    settings = [peft.LoraConfig(target_modules=["down_proj"], lora_alpha=alpha) for alpha in (8, 64)]
    model = peft.get_peft_model(made("plain")[0], settings[0])
    model.add_adapter("other", settings[1])
    keys = [weights_digest(model)]
    with model.disable_adapter():
        keys.append(weights_digest(model))
    assert weights_digest(model) == keys[0]
    model.set_adapter("other")
    keys.append(weights_digest(model))
    model.get_submodule("base_model.model.model.layers.1.mlp.down_proj").scaling["other"] *= 2
    keys.append(weights_digest(model))
    assert len(set(keys)) == 4


@given(st.lists(st.integers(0, 399), min_size=3, max_size=9), st.data())
def test_the_cache_tells_texts_apart(ids, data):
    """What is read, and where scoring begins."""
    store = Cache(None, None).store("a", FIELDS)
    store.folder = "a folder"
    first = data.draw(st.integers(1, len(ids) - 2))
    keys = {store.key(Tokens(tuple(ids), f)) for f in (first, first + 1)}
    keys |= {store.key(Tokens((*ids, 0), first)), store.key(Tokens((*ids[:-1], ids[-1] + 1), first))}
    keys |= {store.key(Tokens(tuple(ids), first, tuple(ids))), store.key(Tokens(tuple(ids), first), 64)}
    assert len(keys) == 6


def test_a_cache_that_cannot_be_written_says_so(tmp_path):
    """As one sentence, when the work is done and before it is lost."""
    model, _, tokens = made("plain")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="the cache could not be written"):
        teacher_forced(model, tokens, store=Cache(tmp_path / "file", model).store("a", FIELDS))


def test_without_its_prompt_the_same_tokens_are_scored():
    """After the beginning of text alone."""
    assert without_prompt(Tokens((5, 6, 7, 8), 2), 0) == Tokens((0, 7, 8), 1)
    assert without_prompt(Tokens((5, 6), 1, (3, 4)), 0) == Tokens((0,), 1, (3, 4))
