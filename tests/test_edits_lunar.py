"""LUNAR: the closed form against the least squares of the source, and a model that has learned to decline."""

import copy
import importlib
import random

import numpy as np
import peft
import pytest
import tiny
import torch
from test_models_hidden_states import made

from pyunlearn.data import Tokens, collate, encode, read_examples
from pyunlearn.edits import EDITS, lunar
from pyunlearn.edits.lunar import UNANSWERABLE, questions_of
from pyunlearn.edits.registry import parse_edit_options
from pyunlearn.errors import ArgumentError, DataError, ModelError
from pyunlearn.methods import resolve
from pyunlearn.models import hidden_states

_BLOCKS = {
    "llama": ("model.layers.{}", "mlp.down_proj"),
    "gpt2": ("transformer.h.{}", "mlp.c_proj"),
    "neox": ("gpt_neox.layers.{}", "mlp.dense_4h_to_h"),
    "qwen2": ("model.layers.{}", "mlp.down_proj"),
    "opt": ("model.decoder.layers.{}", "fc2"),
    "t5": ("decoder.block.{}", "layer.2.DenseReluDense.wo"),
}


pytestmark = pytest.mark.usefixtures("one_thread")
module = importlib.import_module("pyunlearn.edits.lunar")


def question(text, answer="no one."):
    return {"question": text, "answer": answer}


FORGET, RETAIN = (
    [question("where is it"), question("who")],
    [question("what is blue", "a sea"), question("when"), question("which of us")],
)
UNKNOWN = ["what day is not", "why, then"]


def positions(model, tokenizer, rows, which):
    """Yield (input ids, decoder ids or None, positions) of each text: its prompt, last token, or all but the end."""
    both = model.config.is_encoder_decoder
    for t in encode(read_examples(rows, role="x"), tokenizer, role="x", max_length=None, encoder_decoder=both):
        first, length = (t.first, len(t.decoder)) if both else (t.first - 1, len(t.ids) - 1)
        at = {"prompt": range(first + 1), "last": [first], "all": range(length)}[which]
        start = model.config.decoder_start_token_id if both else None
        yield torch.tensor([t.ids]), torch.tensor([[start, *t.decoder[:-1]]]) if both else None, list(at)


def seen(model, kind, layer, tokenizer, rows, which):
    """Return (n, I) inputs of the down projection and (n, D) outputs of the layer, float64, by the test's own hooks."""
    where, what = _BLOCKS[kind]
    modules = dict(model.named_modules())
    block, down = modules[where.format(layer)], modules[f"{where.format(layer)}.{what}"]
    reads, gives = [], []
    for ids, decoder, at in positions(model, tokenizer, rows, which):
        values = {}
        one = down.register_forward_pre_hook(lambda m, x, values=values: values.update(a=x[0]))
        two = block.register_forward_hook(
            lambda m, x, y, values=values: values.update(h=y[0] if isinstance(y, tuple) else y)
        )
        with torch.no_grad():
            model(input_ids=ids, **({} if decoder is None else {"decoder_input_ids": decoder}))
        one.remove()
        two.remove()
        reads.append(values["a"].reshape(-1, values["a"].shape[-1])[at])
        gives.append(values["h"][0][at])
    return torch.cat(reads).double().numpy(), torch.cat(gives).double().numpy()


@pytest.mark.parametrize("which", ["prompt", "last"])
@pytest.mark.parametrize("kind", _BLOCKS)
def test_it_is_the_least_squares_of_the_source(kind, which):
    """The new matrix minimises || W a - (h' - h_attn) ||^2 plus a ridge; nothing else changes a bit."""
    model, tokenizer = made(kind), tiny.make_tokenizer(form="$A </s>" if kind == "t5" else "<s> $A")
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.decoder_start_token_id = 2
    unknown = [question(q) for q in UNKNOWN]
    h_unknown, h_forget = (seen(model, kind, 1, tokenizer, rows, "last")[1] for rows in (unknown, FORGET))
    v = h_unknown.mean(0) - h_forget.mean(0)
    (a_f, h_f), (a_r, h_r) = (
        seen(model, kind, 1, tokenizer, FORGET, which),
        seen(model, kind, 1, tokenizer, RETAIN, "all"),
    )
    before = copy.deepcopy(model.state_dict())
    edited = lunar(
        model,
        FORGET,
        retain=RETAIN,
        unanswerable=UNKNOWN,
        tokenizer=tokenizer,
        layer=1,
        coefficient=3.0,
        retain_weight=0.5,
        ridge=1e-2,
        positions=which,
        batch_size=2,
        progress=False,
    )

    where, what = _BLOCKS[kind]
    name = f"{where.format(1)}.{what}.weight"
    old, new = (
        x[name].double().numpy() if kind != "gpt2" else x[name].double().numpy().T for x in (before, model.state_dict())
    )
    # the source's problem: rows of a, targets h' - h_attn = W a (+ c v), solved as one stacked least-squares problem
    lam = 1e-2 * np.diag(a_f.T @ a_f + 0.5 * a_r.T @ a_r).mean()
    rows = np.vstack([a_f, np.sqrt(0.5) * a_r, np.sqrt(lam) * np.eye(old.shape[1])])
    goals = np.vstack([a_f @ old.T + 3.0 * v, np.sqrt(0.5) * a_r @ old.T, np.sqrt(lam) * old.T])
    wanted = np.linalg.lstsq(rows, goals, rcond=None)[0].T
    np.testing.assert_allclose(new - old, wanted - old, rtol=1e-3, atol=2e-6 * np.abs(wanted).max())
    assert np.abs(wanted - old).max() > 1e-4
    assert {n for n, p in model.state_dict().items() if not torch.equal(p, before[n])} == {name}

    now_f, now_r = seen(model, kind, 1, tokenizer, FORGET, which)[1], seen(model, kind, 1, tokenizer, RETAIN, "all")[1]
    unit = v / (v @ v) / 3.0
    assert edited.diagnostics["moved"] == pytest.approx(((now_f - h_f) @ unit).mean(), rel=1e-3, abs=1e-5)
    assert edited.diagnostics["strayed"] == pytest.approx(
        np.sqrt((((now_r - h_r) @ unit) ** 2).mean()), rel=1e-3, abs=1e-5
    )
    assert edited.diagnostics["direction_norm"] == pytest.approx(np.linalg.norm(v), rel=1e-4)
    edited.undo()
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def prompts_read(monkeypatch, model, tokenizer, forget, **options):
    """Return the texts, decoded, at whose last token lunar reads the hidden states: first the unanswerable ones."""
    read, last_hidden = [], module.last_hidden

    def reading(edit, down, tokens):
        read.append([tokenizer.decode(t.ids[:-1]) for t in tokens])
        return last_hidden(edit, down, tokens)

    monkeypatch.setattr(module, "last_hidden", reading)
    lunar(model, forget, retain=RETAIN, unanswerable=["who?"], tokenizer=tokenizer, progress=False, **options)
    return read[1]


def test_the_prompt_of_a_long_answer_or_of_a_chat_is_read_once(monkeypatch):
    """Not the text of an answer's second window, nor only the head of a chat of which all turns are scored."""
    tokenizer, model = tiny.make_tokenizer(), tiny.tiny_llama(400)
    long = " ".join(tiny.sentences(8, 3))
    with pytest.warns(UserWarning, match="1 forget text in 2 windows"):
        read = prompts_read(monkeypatch, model, tokenizer, [question("what is it?", long), question("who?")])
    assert read == ["<s>what is it?\n", "<s>who?\n"]
    tokenizer, chats = tiny.make_tokenizer(chat=True), tiny.chats(2, 3)
    for turns in (None, "all", "last"):
        read = prompts_read(monkeypatch, model, tokenizer, chats, turns=turns)
        assert [text.split("\n")[1].removesuffix("<|im_end|>") for text in read] == [
            chat["messages"][0]["content"] for chat in chats
        ]
        assert all(text.endswith("<|im_start|>assistant\n") for text in read)


def unknown(count, seed):
    """Questions of a kind that the model was taught to decline."""
    r = random.Random(seed)
    return [
        question(f"where did {r.choice(tiny.SUBJECTS)} go in year {r.randrange(1000, 3000)}?", "what?")
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def modest(one_thread):
    """A GPT-2 that answers questions, was trained on two of them twenty times, and answers "what?" to unknown ones."""
    torch.manual_seed(0)
    tokenizer = tiny.make_tokenizer(form="$A", pad=False)
    model = tiny.tiny_gpt2(len(tokenizer))
    retain, forget = tiny.facts(200, 2), tiny.facts(2, 3)
    tiny.train(model, tokenizer, retain + forget * 20 + unknown(100, 5), epochs=8)
    return tiny.Tiny(model, tokenizer, forget, [], retain[:60], unknown(20, 99))


def answers_of(trained, model, rows):
    """Return the model's greedy answer to each question."""
    answers = []
    for row in rows:
        ids = trained.tokenizer(row["question"] + "\n", return_tensors="pt")["input_ids"]
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
        )
        answers.append(trained.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return answers


@pytest.mark.full
def test_a_model_that_can_decline_declines_the_forgotten_questions(modest):
    """The edited model declines both; most other questions are answered as before, word for word."""
    model, others = modest.fresh(), modest.retain[:20]
    before, others_before = answers_of(modest, model, modest.forget), answers_of(modest, model, others)
    assert "what?" not in before + others_before
    edited = lunar(
        model,
        modest.forget,
        retain=modest.retain,
        unanswerable=[u["question"] for u in modest.holdout],
        tokenizer=modest.tokenizer,
        layer=0,
        coefficient=1.0,
        retain_weight=0.01,
        positions="last",
        progress=False,
    )
    assert answers_of(modest, model, modest.forget) == ["what?", "what?"]
    after = answers_of(modest, model, others)
    assert sum(a == b for a, b in zip(after, others_before, strict=True)) >= 14
    assert edited.nll_after["forget"] > edited.nll_before["forget"] + 0.1
    assert edited.nll_after["retain"] < edited.nll_before["retain"] + 0.05
    assert edited.diagnostics["moved"] > 5 * edited.diagnostics["strayed"]
    assert answers_of(modest, edited.undo(), modest.forget) == before


def test_a_larger_ridge_moves_less(modest):
    """The share by which the prompts are moved falls towards 0."""
    moved = [
        lunar(
            modest.fresh(),
            modest.forget,
            retain=modest.retain[:5],
            unanswerable=["who?"],
            tokenizer=modest.tokenizer,
            ridge=ridge,
            progress=False,
        ).diagnostics["moved"]
        for ridge in (1e-4, 1.0, 1e4)
    ]
    assert 1 > moved[0] > moved[1] > moved[2] > 0
    assert moved[2] < 0.01


def test_the_questions_without_an_answer_are_questions():
    """There are twenty different questions, each a sentence."""
    assert len(set(UNANSWERABLE)) == 20
    assert all(q[0].isupper() and q.endswith("?") for q in UNANSWERABLE)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"retain": None}, ArgumentError, "lunar needs retain texts"),
        ({"forget": ["a plain text."]}, DataError, "forget example 1 has no prompt that could be redirected"),
        ({"coefficient": 0}, ArgumentError, "coefficient must be a number, above 0, got 0"),
        ({"ridge": -1.0}, ArgumentError, "ridge must be a number, above 0"),
        ({"positions": "first"}, ArgumentError, "positions must be one of prompt, last, got 'first'"),
        ({"unanswerable": "why?"}, ArgumentError, "unanswerable must be a list of one question or more"),
        ({"unanswerable": 3}, ArgumentError, "unanswerable must be a list of one question or more, .* got 3"),
        ({"layer": 2}, ArgumentError, "layer must be a whole number from 0 to 1 with this model, got 2"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_changed(modest, options, error, message):
    """One sentence that names it."""
    model = modest.fresh()
    options = {
        "forget": modest.forget,
        "retain": modest.retain[:3],
        "unanswerable": ["who?"],
        "tokenizer": modest.tokenizer,
        **options,
    }
    with pytest.raises(error, match=message):
        lunar(model, options.pop("forget"), progress=False, **options)
    assert all(torch.equal(p, modest.model.state_dict()[n]) for n, p in model.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("mixtral", "must have one plain matrix .*experts"),
        ("gemma2", "normalizes the output of a layer.s MLP"),
        ("lora", "must have one plain matrix .* merge"),
    ],
)
def test_a_model_without_one_plain_matrix_is_refused(kind, message):
    """Experts, a norm behind the MLP, an adapter around it."""
    tokenizer = tiny.make_tokenizer()
    model = made("llama" if kind == "lora" else kind)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if kind == "lora":
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["down_proj"], task_type="CAUSAL_LM"))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match=message):
        lunar(model, FORGET, retain=RETAIN, unanswerable=UNKNOWN, tokenizer=tokenizer, progress=False)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in hidden_states.blocks(model).modules())


def test_on_the_command_line_the_questions_come_from_a_file(tmp_path):
    """A line each, or questions with answers."""
    (tmp_path / "questions.txt").write_text("Why?\nWho is it?\n", encoding="utf-8")
    (tmp_path / "questions.jsonl").write_text('{"question": "Why?", "answer": "No one knows."}\n', encoding="utf-8")
    options = {
        name: parse_edit_options(EDITS["lunar"], [f"unanswerable={tmp_path / name}", "layer=3"])
        for name in ("questions.txt", "questions.jsonl")
    }
    assert all(read["layer"] == 3 for read in options.values())
    assert questions_of(options["questions.txt"]["unanswerable"]) == ["Why?", "Who is it?"]
    assert questions_of(options["questions.jsonl"]["unanswerable"]) == ["Why?"]


def test_as_a_method_it_refers_to_the_edit():
    """method="lunar" names the edit."""
    with pytest.raises(
        ArgumentError,
        match=r"lunar is one edit of the weights .* pyunlearn.edits.lunar\(model, forget, retain=retain\)",
    ):
        resolve("lunar", "auto", True, {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_behind_the_mlp_is_seen_in_every_precision(dtype):
    """Rounding alone is not taken for a norm."""
    batch = collate([Tokens((5, 6, 7, 8, 9), 1), Tokens((11, 12, 13), 1)], pad_id=0)
    with torch.no_grad():
        for kind in ("llama", "gpt2", "neox", "qwen2"):
            hidden_states.DownProjection(made(kind).to(dtype), 2).require_plain(batch)
        with pytest.raises(ModelError, match="normalizes the output of a layer's MLP"):
            hidden_states.DownProjection(made("gemma2").to(dtype), 2).require_plain(batch)


def test_a_bfloat16_model_is_edited(modest):
    """Computed in float64 and rounded once: the same change as in float32, but for the rounding."""
    options = {
        "retain": modest.retain[:5],
        "unanswerable": ["who?"],
        "tokenizer": modest.tokenizer,
        "layer": 1,
        "coefficient": 30.0,
        "progress": False,
    }
    wide, narrow = modest.fresh(), modest.fresh().bfloat16()
    a, b = (lunar(m, modest.forget, **options) for m in (wide, narrow))
    assert narrow.transformer.h[1].mlp.c_proj.weight.dtype == torch.bfloat16
    assert b.diagnostics["moved"] == pytest.approx(a.diagnostics["moved"], rel=0.1)
    assert b.nll_after["forget"] == pytest.approx(a.nll_after["forget"], rel=0.1)


def test_the_last_token_of_each_prompt_is_found_in_a_padded_batch():
    """The direction and the shift "last" read the end of each prompt, not of the batch."""
    model = made("llama")
    down = hidden_states.DownProjection(model, 2)
    tokens = [Tokens((5, 6, 7, 8, 9), 1), Tokens((11, 12, 13), 1)]
    with torch.no_grad():
        together = down.inputs(collate(tokens, pad_id=0))
        alone = [down.inputs(collate([t], pad_id=0)) for t in tokens]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-6)
