"""GGUF files of unlearned models: the weights of the model, the metadata and tokenizer of the file they are like."""

import gguf
import gguf_files
import numpy as np
import pytest
import tiny
import torch
from gguf_files import KINDS, changed, fields_of, model_of

from pyunlearn import models
from pyunlearn.errors import ArgumentError, DependencyError, ModelError, OutputError
from pyunlearn.models.gguf_formats import WRITABLE, largest_error
from pyunlearn.output import save_gguf

IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer of 400 tokens."""
    return tiny.make_tokenizer()


def saved(tmp_path, model, tokenizer, form="F32", **options):
    """(path, report) of the file of a changed model, and the file that it is like."""
    like = gguf_files.write(tmp_path / "base.gguf", model, tokenizer, form, **options)
    report = save_gguf(tmp_path / "new.gguf", changed(model), tokenizer, like=like)
    return tmp_path / "new.gguf", report


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("llama", {"tied": True}),
        ("llama", {"attention_bias": True}),
        ("mistral", {}),
        ("qwen2", {"tied": True}),
        ("qwen3", {"head_dim": 128}),  # transformers reads no other from a file
    ],
)
def test_transformers_reads_the_model_back(kind, settings, tmp_path, tokenizer):
    """In F32 the weights are equal and the logits are the model's; the base's are others."""
    model = model_of(kind, **settings)
    before = model(IDS).logits
    path, report = saved(tmp_path, model, tokenizer)
    again, _ = models.load(path, tokenizer=tokenizer)
    here, there = dict(model.named_parameters()), dict(again.named_parameters())
    biases = {name for name in here if name.endswith("proj.bias")}  # transformers' Llama from GGUF has none
    for name in here.keys() - (biases if kind == "llama" else set()):
        assert torch.equal(here[name], there[name]), name
    assert report.rounding == 0
    if not (biases and kind == "llama"):
        logits = model(IDS).logits
        torch.testing.assert_close(again(IDS).logits, logits, rtol=1e-5, atol=1e-5)
        assert (logits - before).abs().max() > 0.01


def test_the_tensors_are_those_that_the_converter_would_write(tmp_path, tokenizer):
    """Biases of queries and keys have the order of their rows too."""
    model = model_of("llama", attention_bias=True)
    path, _ = saved(tmp_path, model, tokenizer)
    there = {t.name: t.data for t in gguf.GGUFReader(path).tensors}
    wanted = gguf_files.tensors_of(model)
    assert there.keys() == wanted.keys()
    assert "blk.1.attn_q.bias" in wanted
    for name, value in wanted.items():
        np.testing.assert_array_equal(there[name], value, err_msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", WRITABLE)
def test_each_format_is_that_of_the_package(form, dtype, tmp_path, tokenizer):
    """Each matrix in the format of the file that it is like, as gguf rounds it; vectors in float32."""
    model = model_of("llama").to(dtype)
    path, report = saved(tmp_path, model, tokenizer, form)
    wanted = gguf_files.tensors_of(model)
    for t in gguf.GGUFReader(path).tensors:
        own = form if wanted[t.name].ndim > 1 else "F32"
        assert t.tensor_type.name == own
        np.testing.assert_array_equal(t.data, gguf.quants.quantize(wanted[t.name], KINDS[own]))
    assert report.replaced == {}
    assert sum(report.formats.values()) == len(wanted)
    low, high = {"Q4_0": (0.05, 0.2), "Q8_0": (0.001, 0.01), "F32": (0, 0)}.get(form, (0, 0.1))
    assert low <= report.rounding <= high
    before, after = (gguf.GGUFReader(tmp_path / name).tensors for name in ("base.gguf", "new.gguf"))
    same = [np.equal(*(x.data.view(np.uint8).ravel() for x in pair)) for pair in zip(before, after, strict=True)]
    assert report.different == pytest.approx(1 - np.concatenate(same).mean())
    assert report.sentences()[1].startswith(f"{report.different:.2%} of the bytes of its tensors differ from those of")


def test_a_format_that_cannot_be_written_becomes_the_next_larger(tmp_path, tokenizer):
    """Q6_K becomes Q8_0, in the file type too, and the report has the numbers."""
    model = model_of("llama", hidden_size=256, intermediate_size=256, head_dim=64)
    path, report = saved(tmp_path, model, tokenizer, "Q6_K")
    assert report.replaced == {"Q6_K -> Q8_0": 16}
    assert {t.tensor_type.name for t in gguf.GGUFReader(path).tensors} == {"Q8_0", "F32"}
    base, new = (gguf.GGUFReader(p).fields["general.file_type"].contents() for p in (tmp_path / "base.gguf", path))
    assert (base, new) == (18, 7)
    size = (tmp_path / "base.gguf").stat().st_size
    assert report.sentences()[2] == (
        f"Larger formats than in base.gguf, which has {size / 1e6:.1f} MB: 16 Q6_K -> Q8_0 (6.562 -> 8.5 bits a "
        "weight)."
    )
    assert report.sentences()[0].startswith("new.gguf is like base.gguf: 16 Q8_0, 5 F32 tensors, 1.")
    again, _ = models.load(path, tokenizer=tokenizer)
    assert (again(IDS).logits - model(IDS).logits).abs().max() < 0.2


def test_a_larger_format_can_be_chosen(tmp_path, tokenizer):
    """For what is smaller alone; a format that cannot be written is named."""
    model = model_of("llama")
    like = gguf_files.write(tmp_path / "base.gguf", model, tokenizer, "Q4_0")
    report = save_gguf(tmp_path / "new.gguf", changed(model), tokenizer, like=like, at_least="F16")
    assert report.formats == {"F16": 16, "F32": 5}
    assert report.replaced == {"Q4_0 -> F16": 16}
    assert gguf.GGUFReader(tmp_path / "new.gguf").fields["general.file_type"].contents() == 1
    assert report.rounding < 0.001
    with pytest.raises(ArgumentError, match=r"at_least must be one of Q4_0, .*, got 'Q8': did you mean \"Q8_0\""):
        save_gguf(tmp_path / "other.gguf", model, tokenizer, like=like, at_least="Q8")


def test_the_metadata_are_those_of_the_file_but_for_what_describes_it(tmp_path, tokenizer):
    """Types of list elements and strings that are no UTF-8 too; not the identity and the maker of the other file."""
    strings = {"general.url": "https://example.org/tiny", "general.organization": "somebody", "quantize.imatrix.x": "y"}
    path, _ = saved(tmp_path, model_of("qwen2"), tokenizer, "Q8_0", strings=strings, alignment=64, raw=b"\xff")
    before, after = fields_of(tmp_path / "base.gguf"), fields_of(path)
    own = {"general.name", "general.quantized_by"}
    left_out = {"general.uuid", "general.url", "quantize.imatrix.x"}
    assert before.keys() - after.keys() == left_out
    assert {key: after[key] for key in after.keys() - own} == {
        key: before[key] for key in before.keys() - own - left_out
    }
    fields = gguf.GGUFReader(path).fields
    assert fields["general.name"].contents() == "Tiny unlearned"
    assert fields["general.quantized_by"].contents().startswith("pyunlearn ")
    assert fields["general.file_type"].contents() == 7
    assert fields["tiny.bytes"].types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT8]
    assert gguf.GGUFReader(path).alignment == 64


def test_frequencies_are_copied(tmp_path, tokenizer):
    """They are computed from the configuration, and no weights of the model."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 48, "rope_theta": 10000.0}
    model = model_of("llama", rope_scaling=scaling)
    frequencies = np.linspace(1, 8, 8, dtype=np.float32)
    path, report = saved(tmp_path, model, tokenizer, extra={"rope_freqs.weight": frequencies})
    there = {t.name: t.data for t in gguf.GGUFReader(path).tensors}
    np.testing.assert_array_equal(there["rope_freqs.weight"], frequencies)
    assert sum(report.formats.values()) == len(there) - 1


def test_a_model_that_was_read_from_a_file_is_like_it(tmp_path, tokenizer):
    """Saved once more, the name does not grow."""
    like = gguf_files.write(tmp_path / "base.gguf", model_of("llama"), tokenizer, "Q8_0")
    model, _ = models.load(like, tokenizer=tokenizer)
    report = save_gguf(tmp_path / "a.gguf", model, tokenizer)
    assert (report.like, report.rounding) == ("base.gguf", pytest.approx(0, abs=1e-6))
    assert report.different == pytest.approx(0, abs=0.001)
    save_gguf(tmp_path / "b.gguf", tmp_path / "a.gguf", tokenizer, like=tmp_path / "a.gguf")
    assert gguf.GGUFReader(tmp_path / "b.gguf").fields["general.name"].contents() == "Tiny unlearned"


@pytest.mark.parametrize("form", WRITABLE)
def test_no_weight_is_rounded_further_than_is_allowed(form):
    """From float16's smallest numbers up; and some weight is rounded by nearly as much."""
    rng, reached = np.random.default_rng(0), 0.0
    for scale in (1e-9, 1e-7, 1e-5, 1e-3, 1.0, 1e3):
        rows = (rng.normal(size=(400, 64)) * scale).astype(np.float32)
        rows[:100] = rng.choice([-scale, scale], size=(100, 64))  # both ends of a block
        rows[100:200] += np.float32(3 * scale)
        kind = KINDS[form]
        error = np.abs(gguf.quants.dequantize(gguf.quants.quantize(rows, kind), kind) - rows)
        allowed = largest_error(rows, form)
        assert (error <= allowed).all(), scale
        reached = max(reached, float((error / np.maximum(allowed, 1e-30)).max()))
    assert reached > 0.9 or form == "F32"


# ---------------------------------------------------------------- what is refused


def refused(tmp_path, model, tokenizer, error, match, *, like=None, **options):
    """Assert that no file is written, and why."""
    like = like or gguf_files.write(tmp_path / "base.gguf", model_of("llama"), tokenizer, **options)
    there = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=match) as caught:
        save_gguf(tmp_path / "new.gguf", model, tokenizer, like=like)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == there


@pytest.mark.parametrize(
    ("model", "match"),
    [
        ({"seed": 5}, r"another model: its tensor token_embd.weight has a cosine of -?0\.0. with the model's weights"),
        ({"vocab_size": 416}, "its vocabulary has 400 tokens and the model's 416"),
        ({"intermediate_size": 96}, r"its tensor blk.0.ffn_gate.weight has the shape \(128, 64\) and the model's"),
        ({"num_hidden_layers": 3}, "its block_count is 2 and not 3"),
        ({"num_key_value_heads": 4}, "its attention.head_count_kv is 2 and not 4"),
        ({"rms_norm_eps": 1e-5}, "its attention.layer_norm_rms_epsilon is .* and not 1e-05"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "its positions are not scaled"),
        ({"attention_bias": True}, "it has no tensor blk.0.attn_q.bias for the weights of the model"),
        ({"kind": "qwen2"}, "of the architecture llama, and the model is a qwen2"),
        ({"tied": True}, "has a cosine"),
    ],
)
def test_a_file_of_another_model_is_refused(model, match, tmp_path, tokenizer):
    """By its settings, shapes, tensors or weights."""
    refused(tmp_path, model_of(**{"kind": "llama"} | model), tokenizer, ModelError, match)


def test_another_tensor_another_head_and_another_frequency_are_refused(tmp_path, tokenizer):
    """A tensor without weights in the model, a head that the file lacks, a file whose positions are scaled."""
    model = model_of("llama")
    for options, match in (
        (
            {"extra": {"blk.0.new.weight": np.ones((64, 64))}},
            "the model has no weights for its tensor blk.0.new.weight",
        ),
        ({"drop": ["output.weight"]}, "it has no tensor output.weight for the weights of the model"),
        ({"extra": {"rope_freqs.weight": np.ones(8)}}, "its positions are scaled, and the model has rope_type default"),
        ({"theta": 5e5}, "its rope.freq_base is 500000.0 and not 10000"),
        ({"tokens": [f"t{i}".encode() for i in range(400)]}, "another tokenizer: 0 of its tokens are those of the"),
        ({"tokens": [b"a"] * 399}, "its tokenizer has 399 tokens and its embeddings 400 rows"),
        ({"numbers": {"split.count": 2}}, "is one of several parts"),
    ):
        refused(tmp_path, model, tokenizer, ModelError, match, **options)


def test_an_unknown_architecture_is_refused_by_name(tmp_path, tokenizer):
    """Never guessed."""
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "gemma3")
    writer.add_name("other")
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    like = tmp_path / "other.gguf"
    match = "of the architecture 'gemma3', and pyunlearn writes those of llama, qwen2, qwen3 alone"
    refused(tmp_path, model_of("llama"), tokenizer, ModelError, match, like=like)


def test_weights_that_the_format_cannot_hold_are_refused(tmp_path, tokenizer):
    """A float16 ends at 65,504; NaN is no weight."""
    model = model_of("llama")
    like = gguf_files.write(tmp_path / "base.gguf", model, tokenizer, "F16")
    model.lm_head.weight.data[1] = 1e4
    large = gguf_files.write(tmp_path / "large.gguf", model, tokenizer, "F16")
    model.lm_head.weight.data[1, 3] = 7e4
    match = "output.weight differs by more than the rounding of F16; take one in another format"
    with np.errstate(over="ignore"):
        refused(tmp_path, model, tokenizer, ModelError, match, like=large)
    broken = model_of("llama")
    broken.model.norm.weight.data[3] = float("nan")
    refused(tmp_path, broken, tokenizer, ModelError, "for the tensor output_norm.weight are NaN or Inf", like=like)


@pytest.mark.full
def test_an_adapter_is_merged_first(tmp_path, tokenizer):
    """Merged, it is in the file."""
    peft = pytest.importorskip("peft")
    model = model_of("llama")
    like = gguf_files.write(tmp_path / "base.gguf", model, tokenizer)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            p.data += 0.02
    refused(tmp_path, adapted, tokenizer, ArgumentError, "has an adapter, and .* merge it first", like=like)
    logits = adapted(IDS).logits
    save_gguf(tmp_path / "new.gguf", adapted.merge_and_unload(), tokenizer, like=like)
    again, _ = models.load(tmp_path / "new.gguf", tokenizer=tokenizer)
    torch.testing.assert_close(again(IDS).logits, logits, rtol=1e-4, atol=1e-4)


def test_names_that_cannot_be_used_are_refused(tmp_path, tokenizer):
    """A file that is there, another ending, no file to be like, no GGUF file."""
    model = model_of("llama")
    like = gguf_files.write(tmp_path / "base.gguf", model, tokenizer)
    (tmp_path / "text.gguf").write_text("text")
    for path, source, error, match in (
        ("base.gguf", like, OutputError, "base.gguf is there already"),
        ("new.bin", like, OutputError, r"must end in \.gguf, got .*new.bin"),
        ("new.gguf", None, ArgumentError, "like must name a GGUF file of the model as it was before"),
        ("new.gguf", tmp_path / "no.gguf", ModelError, "no.gguf was not found"),
        ("new.gguf", tmp_path / "text.gguf", ModelError, "text.gguf is no GGUF file, or damaged"),
    ):
        with pytest.raises(error, match=match):
            save_gguf(tmp_path / path, model, tokenizer, like=source)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.gguf", "text.gguf"]


def test_a_full_disk_leaves_nothing(tmp_path, tokenizer, monkeypatch):
    """One sentence, and no half-written file."""
    model = model_of("llama")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    refused(tmp_path, model, tokenizer, OutputError, "new.gguf could not be written to .*No space left")


@pytest.mark.parametrize("form", ["F32", "F16", "Q8_0", "Q4_0"])
def test_a_wrong_weight_in_the_file_is_seen(form, tmp_path, tokenizer, monkeypatch):
    """Two rows that change places in what is written, as a wrong converter would."""
    like, right = gguf_files.write(tmp_path / "base.gguf", model_of("llama"), tokenizer, form), gguf.quants.quantize

    def wrong(rows, kind):
        return right(rows[[1, 0, *range(2, len(rows))]] if len(rows) == 128 else rows, kind)

    monkeypatch.setattr(gguf.quants, "quantize", wrong)
    match = f"ffn_gate.weight differs by more than the rounding of {form}"
    refused(tmp_path, model_of("llama"), tokenizer, ModelError, match, like=like)


def test_an_old_package_is_named(tmp_path, tokenizer, monkeypatch):
    """Its writer would change the types of lists."""

    def add_key_value(self, key, val, vtype):
        pass

    model = model_of("llama")
    like = gguf_files.write(tmp_path / "base.gguf", model, tokenizer)
    monkeypatch.setattr(gguf.GGUFWriter, "add_key_value", add_key_value)
    refused(tmp_path, model, tokenizer, DependencyError, "needs gguf 0.17 or newer", like=like)
