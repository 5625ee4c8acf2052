"""Arguments of the audit: one sentence for every wrong value, before any text is read."""

import inspect
import math
from types import SimpleNamespace

import pytest
import tiny
import torch
from test_probes_teacher_forced import made

import pyunlearn
from pyunlearn.auditing import METRICS, AuditConfig
from pyunlearn.errors import ArgumentError, DataError, ModelError, OutputError
from pyunlearn.probes.cache import Cache, remove_cache, weights_digest
from pyunlearn.report import audit_page

MISSING = "no/such/texts.jsonl"  # reading it would end in another error


class Headless(torch.nn.Linear):
    """A module that is no language model."""


def headless():
    """A transformers model without a language-model head."""
    from transformers import LlamaConfig, LlamaModel

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    return LlamaModel(LlamaConfig(vocab_size=11, **sizes))


MODELS = [
    (3, ModelError, "must be a transformers language model, a path or a name, got a value of type int"),
    ([], ModelError, "got a value of type list"),
    (Headless(2, 2), ModelError, "got a value of type Headless"),
    ("", ArgumentError, "must be the path"),
    ("a\0b", ArgumentError, "must be the path"),
    ("./no-such-folder/x", ModelError, "no language model could be loaded from ./no-such-folder/x"),
    ("/no/such/model.gguf", ModelError, "no language model could be loaded from /no/such/model.gguf"),
]
SETTINGS = [
    ("metrics", ["membershp"]),
    ("metrics", "membership"),
    ("metrics", 3),
    ("target_exposure", 5.0),
    ("target_exposure", -1),
    ("target_exposure", math.nan),
    ("batch_size", 0),
    ("batch_size", True),
    ("batch_size", "x"),
    ("budget", 0),
    ("budget", 2.5),
    ("workspace", -1),
    ("workspace", "big"),
    ("truncate", "yes"),
    ("seed", -1),
    ("seed", "x"),
]


def audit(*arguments, **options):
    """Run an audit of texts that cannot be read; return the error's one sentence and its type."""
    model, tokenizer, _ = made("plain")
    options = {"tokenizer": tokenizer, "progress": False, **options}
    with pytest.raises(pyunlearn.PyunlearnError) as error:
        pyunlearn.audit(*(arguments or (model,)), MISSING, **options)
    assert "\n" not in str(error.value)
    return str(error.value), type(error.value)


@pytest.mark.parametrize(("name", "value"), SETTINGS)
def test_a_wrong_setting(name, value):
    """The sentence names the setting, what was wanted and what came."""
    message, kind = audit(**{name: value})
    assert message.startswith(f"{name} must be ")
    assert ", got " in message
    assert kind is ArgumentError


@pytest.mark.parametrize("name", ["model", "original", "reference_model"])
@pytest.mark.parametrize(("value", "error", "message"), MODELS)
def test_a_wrong_model(name, value, error, message):
    """The sentence names the argument, for paths as well as for objects."""
    got, kind = audit(value) if name == "model" else audit(**{name: value})
    assert name in got
    assert message in got
    assert kind is error


@pytest.mark.parametrize("name", ["model", "original", "reference_model"])
def test_a_model_without_a_head(name):
    """It gives text no probability."""
    got, kind = audit(headless()) if name == "model" else audit(**{name: headless()})
    assert got.startswith(f"{name} must have a language-model head")
    assert kind is ModelError


def test_no_model_at_all():
    """None is a value of the optional ones only."""
    assert audit(None) == (
        "model must be a transformers language model, a path or a name, got a value of type NoneType",
        ModelError,
    )


@pytest.mark.parametrize("name", ["original", "reference_model"])
def test_a_model_of_another_vocabulary(name):
    """The sentence names both."""
    message, kind = audit(**{name: tiny.tiny_llama(77)})
    assert message.startswith(f"{name} has another vocabulary than model, 77 tokens and not ")
    assert kind is ModelError


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("tokenizer", 1, ModelError),
        ("tokenizer", [], ModelError),
        ("tokenizer", "", ArgumentError),
        ("cache", 1, ArgumentError),
        ("cache", "", ArgumentError),
        ("cache", True, ArgumentError),
        ("progress", "yes", ArgumentError),
        ("progress", 1, ArgumentError),
        ("config", 3, ArgumentError),
        ("config", {"seed": 1}, ArgumentError),
    ],
)
def test_another_wrong_value(name, value, error):
    """The sentence names the argument."""
    message, kind = audit(**{name: value})
    assert message.startswith(f"{name} must be ")
    assert kind is error


def test_a_cache_that_is_a_file(tmp_path):
    """Before the work, and not after it."""
    (tmp_path / "cache").write_text("")
    message, kind = audit(cache=tmp_path / "cache")
    assert message.startswith("cache must be a folder")
    assert kind is OutputError


@pytest.mark.parametrize("inside", ["thesis.txt", "README.txt", "0123456789abcdef01234567.txt", "0" * 23 + "/x"])
def test_only_what_a_cache_made_is_removed_with_it(tmp_path, inside):
    """A folder of the user's that has the name of an audit's cache stays, with all that is in it; the cache goes."""
    folder, model = tmp_path / "model-audit.cache", made("no pad token")[0]
    (folder / inside).parent.mkdir(parents=True)
    (folder / inside).write_text("mine")
    Cache(folder, model).store("teacher_forced", ("a",))
    remove_cache(folder)
    assert [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()] == [inside]
    (folder / inside).unlink()
    (folder / inside).parent.rmdir() if "/" in inside else None
    Cache(folder, model).store("teacher_forced", ("a",))
    assert {path.name for path in folder.iterdir()} == {weights_digest(model)[:24], "README.txt"}
    remove_cache(folder)
    assert not folder.exists()


@pytest.mark.parametrize("command", ["audit", "unlearn"])
def test_the_output_folder_can_be_the_current_one(call, tmp_path, monkeypatch, command):
    """`--out .`: what is kept during the work is next to that folder, and an interruption says where."""

    def stop(*args, **options):
        (tmp_path / "here.checkpoint.pt").write_text("")
        raise KeyboardInterrupt

    (tmp_path / "texts.txt").write_text("one text\n")
    monkeypatch.setattr(pyunlearn, command, stop)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    code, _, err = call(command, "model", "--forget", "../texts.txt", "--out", ".", "-q")
    assert (code, err.count("\n")) == (130, 1), err
    assert ("here.cache" if command == "audit" else "--resume") in err


@pytest.mark.parametrize("command", ["audit", "unlearn", "compare", "attack", "edit"])
def test_the_root_is_no_output_folder(call, tmp_path, command):
    """Nor any other folder that is not empty: one sentence."""
    (tmp_path / "texts.txt").write_text("one text\n")
    own = ("--edit", "fisher_step") if command == "edit" else ()
    code, _, err = call(command, "model", "--forget", "texts.txt", "--out", "/", "-q", *own)
    assert (code, err.count("\n")) == (2, 1), err
    assert "/ is not empty" in err


def test_one_text_that_the_reference_model_finds_easiest_is_audited():
    """As one of 21 unseen texts is: PrivLeak has no value against an area of 1, and the rest of the audit has."""
    model, tokenizer, _ = made("no pad token")
    reference = made("no pad token")[0]
    with torch.no_grad():
        reference.transformer.wte.weight.mul_(1.5)
    texts = tiny.sentences(21, 2)
    nll = tiny.negative_log_likelihoods(SimpleNamespace(tokenizer=tokenizer), texts, reference)
    easiest = texts.pop(int(nll.argmin()))
    result = pyunlearn.audit(
        model, [easiest], holdout=texts, reference_model=reference, tokenizer=tokenizer, metrics=["membership"],
        progress=False,
    )  # fmt: skip
    assert next(m for m in result.membership if m.score == "loss").privleak is None
    assert len(result.membership) == 5
    assert result.examples[0].verdict in ("not memorized", "still exposed")
    assert "PrivLeak" in audit_page(result) or all(m.privleak is None for m in result.membership)


def test_an_unknown_option_is_told_the_nearest():
    """As for every function with a config."""
    assert audit(bach_size=3)[0] == "audit has no option 'bach_size': did you mean \"batch_size\"?"


def test_texts_that_cannot_be_used():
    """Missing ones, and too few of the holdout."""
    assert audit() == audit(seed=1)
    assert "the forget file no/such/texts.jsonl was not found" in audit()[0]
    model, tokenizer, _ = made("plain")
    with pytest.raises(DataError, match="takes 19 "):
        pyunlearn.audit(model, tiny.sentences(3, 1), holdout=tiny.sentences(18, 4), tokenizer=tokenizer, progress=False)


def test_a_holdout_with_a_forget_text_is_refused_before_the_model_is_loaded(monkeypatch):
    """Which one, and what to do."""
    monkeypatch.delattr("pyunlearn.auditing.api._collect")
    model = made("plain")[0]
    forget, holdout = tiny.sentences(3, 1), tiny.sentences(19, 2)
    with pytest.raises(DataError, match=r"holdout example 20 .* nearly one, of forget example 2: take it out"):
        pyunlearn.audit(model, forget, holdout=[*holdout, forget[1].upper()])
    with pytest.raises(DataError, match="36 texts only 18 are different"):
        pyunlearn.audit(model, forget, holdout=holdout[:18] * 2)
    with pytest.raises(DataError, match="nothing of retain is left"):
        pyunlearn.audit(model, forget, retain=forget[0])


def test_the_texts_that_are_left_out_and_the_kind_of_the_holdout_are_noted():
    """In the result, in its JSON and below the table; the first also as a warning."""
    from pyunlearn.report import audit_lines

    model, tokenizer, _ = made("plain")
    forget, retain = tiny.sentences(12, 1), tiny.sentences(4, 3)
    holdout = [f"{a} {b} {c}" for a, b, c in zip(*(tiny.sentences(24, seed) for seed in (4, 5, 6)), strict=True)]
    options = {"tokenizer": tokenizer, "progress": False, "metrics": []}
    with pytest.warns(UserWarning, match="1 of 5 retain texts is a copy") as caught:
        audit = pyunlearn.audit(model, forget, retain=[*retain, forget[2]], holdout=holdout, **options)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    left_out, length, *more = audit.notes
    assert left_out == str(caught[0].message)
    assert length.startswith("The holdout is of another length than the forget set: 33 words at the median, where the ")
    assert all(n.startswith("24 non-members can name ") for n in more)
    assert audit.to_dict()["notes"] == audit.notes
    assert set(audit.notes) <= set(audit_lines(audit))
    assert audit.utility.texts == 4
    few = (
        "30 non-members can name memorized texts only where 8 or more of these 12 are memorized; to name a single one "
    )
    assert pyunlearn.audit(model, forget, holdout=tiny.sentences(30, 2), **options).notes == [few + "takes 239."]


def test_scores_under_the_reference_model_tell_another_register():
    """A reference model trained on the grammar knows sentences, and finds the same words in another order odd."""
    reference = tiny.storyteller()
    forget = tiny.sentences(12, 21)
    holdout = [" ".join(reversed(text.split())) for text in tiny.sentences(24, 22)]
    options = {"tokenizer": reference.tokenizer, "progress": False, "metrics": [], "reference_model": reference.model}
    model = tiny.tiny_llama(len(reference.tokenizer))
    note, subtracted, *_ = pyunlearn.audit(model, forget, holdout=holdout, **options).notes
    assert subtracted.startswith("Each score is less what the reference model gives the same text")
    assert "nats a token less likely than the forget set (Mann-Whitney, p = " in note
    same_kind = pyunlearn.audit(model, forget, holdout=tiny.sentences(24, 22), **options).notes
    assert [n for n in same_kind if not n.startswith("24 non-members can name ")] == [subtracted]


def test_settings_come_from_a_config_a_file_and_keywords(tmp_path):
    """A config, a TOML file and an earlier audit.json; keywords change single settings."""
    model, tokenizer, _ = made("plain")
    options = {"holdout": tiny.sentences(19, 2), "tokenizer": tokenizer, "progress": False}
    config = AuditConfig(metrics=["membership"], batch_size=5)
    first = pyunlearn.audit(model, tiny.sentences(3, 1), config=config, seed=7, **options)
    wanted = {"metrics": ["membership"], "batch_size": 5, "seed": 7, "truncate": False, "budget": None}
    assert wanted.items() <= first.settings.items()
    from pyunlearn.report import write_audit

    folder = write_audit(first, tmp_path / "audit", html=False)
    again = pyunlearn.audit(model, tiny.sentences(3, 1), config=folder / "audit.json", **options)
    assert again.settings == first.settings
    assert again.examples == first.examples


def test_the_signature_lists_every_setting():
    """With the defaults of AuditConfig, and so does the docstring."""
    parameters = inspect.signature(pyunlearn.audit).parameters
    for name, value in vars(AuditConfig()).items():
        assert parameters[name].default == value
        assert f"\n    {name}: " in inspect.getdoc(pyunlearn.audit)
    assert AuditConfig().metrics == METRICS
