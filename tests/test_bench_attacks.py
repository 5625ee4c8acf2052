"""Attack columns of benchmarks: a model that only hides the texts shows it, and one that never saw them does not."""

import copy
import json
import re

import numpy as np
import planted
import pytest
import tiny
from tofu_folder import perturbed, tofu_folder, write

import pyunlearn
from pyunlearn.errors import ArgumentError, DataError

PLAIN = {"template": "default", "max_new_tokens": 200}
SHORT = {"template": "none", "progress": False, "max_new_tokens": 1}


@pytest.fixture(scope="module")
def w(one_thread):
    """The world of the planted models."""
    return planted.world()


@pytest.fixture
def data(tmp_path):
    """A folder like TOFU's, of the texts of planted.world(), which the planted models hide."""
    rows = {"forget10": (tiny.facts(planted.SECRETS, 1), True), "retain": (tiny.facts(20, 2), True)}
    rows |= {"real_authors": (tiny.facts(6, 3), False), "world_facts": (tiny.facts(6, 4), False)}
    made = {
        f"{name}_perturbed": perturbed(each, seed, paraphrased)
        for seed, (name, (each, paraphrased)) in enumerate(rows.items(), 1)
    }
    return tofu_folder(tmp_path / "TOFU", made)


def bench(w, model, data, *attacks, **options):
    """The result of a model, with the world's own as the retrained one."""
    return pyunlearn.bench(
        "tofu", model, data, retrained=w.model, tokenizer=w.tokenizer, attacks=attacks, **SHORT | options
    )


@pytest.fixture(scope="module")
def hiding(w):
    """A model that knows the texts by heart, under an adapter that hides them."""
    peft = pytest.importorskip("peft")
    model = copy.deepcopy(planted.memorized())
    return planted.hidden_in("lora_", peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["down_proj"])))


@pytest.mark.full
def test_a_model_that_only_hides_the_texts_shows_it(w, hiding, data):
    """Without its adapter they are back; the columns and numbers are those of `attack`, and no text is written."""
    result = bench(w, hiding, data, "adapter", "prefix")
    own = pyunlearn.attack(
        hiding,
        w.forget,
        retain=tiny.facts(20, 2),
        control=w.model,
        tokenizer=w.tokenizer,
        template="none",
        attacks=("adapter", "prefix"),
        progress=False,
    )
    column = result["attacks_without_the_adapter"]
    assert column.estimate > 0.5
    assert column.low < column.estimate <= column.high
    assert result["attacks_any"].estimate == np.mean([e.verdict == "comes back" for e in own.examples])
    assert result["attacks_without_an_attack"].estimate == 0
    assert result["attacks_p-value"].estimate == own.pvalue < 1e-3
    assert {c.questions for c in result.columns.values() if c.set == "attacks"} == {planted.SECRETS}
    numbers = result.to_dict()["numbers"]["attacks"]
    assert numbers["without the adapter"] == [e.exposures["without the adapter"] for e in own.examples]
    assert own.headline in result.notes
    text = json.dumps(result.to_dict())
    assert not [row for row in w.forget if row["answer"] in text or row["question"] in text]
    plain = pyunlearn.bench("tofu", hiding, data, retrained=w.model, tokenizer=w.tokenizer, **SHORT)
    assert {name: c for name, c in result.columns.items() if c.set != "attacks"} == plain.columns


@pytest.mark.full
def test_a_model_that_never_saw_the_texts_shows_none(w, data):
    """All attacks of the default, on a model that has read its retain set once more."""
    model = copy.deepcopy(w.model)
    tiny.train(model, w.tokenizer, w.retain, epochs=1)
    result = bench(w, model.eval(), data, "default")
    assert result["attacks_any"].estimate == 0
    assert result["attacks_p-value"].estimate > 0.025
    assert len([c for c in result.columns.values() if c.set == "attacks"]) >= 6


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"retrained": None}, ArgumentError, r"attacks compare with a retrained model, .* give one \(--retrained\)"),
        (
            {"retrained": "a.json"},
            ArgumentError,
            r"attacks need the weights of the retrained model, and a.json has its",
        ),
        ({"benchmark": "wmdp", **PLAIN}, ArgumentError, "attacks is an option of tofu and muse, and wmdp has none"),
        ({"attacks": ("prefixes",)}, ArgumentError, "attacks must be a list of different values"),
    ],
)
def test_what_attacks_need_is_one_sentence(data, change, error, message):
    """Before a model is read."""
    tokenizer = tiny.make_tokenizer()
    model = tiny.tiny_llama(len(tokenizer))
    arguments = {"benchmark": "tofu", "retrained": model, "attacks": ("default",)} | change
    with pytest.raises(error, match=message) as caught:
        pyunlearn.bench(arguments.pop("benchmark"), model, data, tokenizer=tokenizer, **SHORT | arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.full
def test_the_command_prints_the_columns(w, hiding, data, call, tmp_path):
    """A table of their own, and a line with the p-value."""
    for name, model in (("model", hiding), ("retrained", w.model)):
        if name == "model":
            copy.deepcopy(hiding).unload().save_pretrained(tmp_path / "base")
            hiding.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        model.save_pretrained(tmp_path / name)
        w.tokenizer.save_pretrained(tmp_path / name)
    options = ["--data", data, "--template", "none", "--max-new-tokens", 1, "--quiet", "--attacks", "prefix"]
    code, out, err = call("bench", "tofu", "model", *options, "--retrained", "retrained", "--out", "own")
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    start = lines.index("attack texts come back")
    assert lines[start + 2].startswith("without an attack 8 0.000 [.000, ")
    assert [line for line in lines if re.fullmatch(r"any 8 0\.\d{3} \[\.\d{3}, \d?\.\d{3}\]", line)]
    assert [line for line in lines if re.fullmatch(r"under attack: p = .* for the set", line)]
    content = json.loads((tmp_path / "own" / "bench.json").read_text())
    assert content["settings"]["attacks"] == ["prefix"]
    assert content["columns"]["attacks_p-value"]["low"] is None


@pytest.mark.full
def test_muse_attacks_its_texts_among_those_of_its_holdout(w, data, tmp_path, hiding):
    """Too few of them are refused at once."""
    texts = {
        role: [{"text": f"{row['question']} {row['answer']}"} for row in rows]
        for role, rows in {"forget": w.forget, "holdout": w.holdout}.items()
    }
    folder = tmp_path / "MUSE"
    for name in ("verbmem", "knowmem", "privleak"):
        (folder / name).mkdir(parents=True)
    write(folder / "verbmem" / "forget.jsonl", [{"prompt": "the", "gt": "king"}])
    for name in ("forget_qa", "retain_qa"):
        write(folder / "knowmem" / f"{name}.jsonl", [{"question": "who?", "answer": "king"}])
    for role, rows in texts.items():
        write(folder / "privleak" / f"{role}.jsonl", rows)
    options = {"retrained": w.model, "tokenizer": w.tokenizer, "attacks": ("adapter",), "progress": False}
    result = pyunlearn.bench("muse", hiding, folder, **options)
    assert {c.questions for c in result.columns.values() if c.set == "attacks"} == {planted.SECRETS}
    assert "attacks_without_the_adapter" in result.columns
    with pytest.raises(DataError, match=r"attacks compare with 39 texts or more .* and there are 9"):
        pyunlearn.bench("muse", hiding, folder, first=9, **options)
