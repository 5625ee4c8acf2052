"""Write the weights of a transformers model as a GGUF file that is like another one, and verify what was written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pyunlearn.errors import ArgumentError, ModelError
from pyunlearn.models.gguf_formats import bits_per_weight, largest_error, package, packed, unpacked
from pyunlearn.models.gguf_layout import Placed, placed, read_like, tokens_problem, value_of
from pyunlearn.models.inspection import unwrapped
from pyunlearn.models.loading import origin, present_options
from pyunlearn.models.sharding import is_part
from pyunlearn.progress import Progress

Floats = NDArray[np.float32]

_ROWS = 1 << 22  # weights that are converted at once
_ALIKE = 0.8  # smallest cosine of a matrix and that of the file it replaces
_OF_ANOTHER = (  # metadata on the file that it is like, or on how that was made
    "general.uuid",
    "general.url",
    "general.doi",
    "general.repo_url",
    "quantize.imatrix.",
)
_NAMES = ("general.name", "general.quantized_by", "general.file_type")


@dataclass(frozen=True)
class GgufReport:
    """A GGUF file that was written and read back.

    >>> print(*GgufReport("a.gguf", "b.gguf", {"F32": 1}, {}, 9, 9, 0.0, 0.5).sentences(), sep="\\n")
    a.gguf is like b.gguf: 1 F32 tensor, 0.0 MB; each was read back and is the weights.
    50.00% of the bytes of its tensors differ from those of b.gguf.
    """

    path: str
    """Its name, without its folder."""
    like: str
    """Name of the file whose metadata, tokenizer and formats it has."""
    formats: dict[str, int]
    """Format -> number of tensors."""
    replaced: dict[str, int]
    """"Q4_K -> Q4_1" -> number of tensors in a larger format than those of `like`."""
    bytes: int
    bytes_like: int
    rounding: float
    """Root mean square of the rounding, relative to that of the weights."""
    different: float | None
    """Share of the bytes of the tensors that differ from those of `like`; of tensors in the same format, None without.

    Where it is small, rounding may have undone the run.
    """

    def sentences(self) -> list[str]:
        """Return what a report says about the file, a sentence each."""
        counts = ", ".join(f"{n} {name}" for name, n in self.formats.items())
        verified = f", within its format's rounding ({self.rounding:.2%} of the weights)" if self.rounding else ""
        lines = [
            f"{self.path} is like {self.like}: {counts} tensor{'s' * (sum(self.formats.values()) > 1)}, "
            f"{self.bytes / 1e6:.1f} MB; each was read back and is the weights{verified}."
        ]
        if self.different is not None:
            same = "" if not self.replaced else ", where the format is the same"
            lines.append(f"{self.different:.2%} of the bytes of its tensors differ from those of {self.like}{same}.")
        if self.replaced:
            names = ", ".join(
                f"{n} {change} ({_bits(change, 0)} -> {_bits(change, 1)} bits a weight)"
                for change, n in self.replaced.items()
            )
            lines.append(f"Larger formats than in {self.like}, which has {self.bytes_like / 1e6:.1f} MB: {names}.")
        return lines


def _bits(change: str, end: int) -> str:
    return f"{bits_per_weight(change.split(' -> ')[end]):.4g}"


def require_like(like: str | Path, model: str | Path, *, adapts: bool = False, merges: bool = False) -> None:
    """Raise an error unless a GGUF file like another one can be written of a model that is not loaded yet.

    Configuration and shapes are compared, before a run.

    Args:
        like: path of the GGUF file.
        model: path or name of the model.
        adapts: whether the run makes an adapter.
        merges: whether the run merges the model's adapter.

    Raises:
        ArgumentError, ModelError, DependencyError: as `write_gguf`.
    """
    reader = read_like(like)
    if present_options().load_in_4bit:
        raise ArgumentError("a GGUF file needs the weights before they are rounded: leave --load-in-4bit out")
    with origin(model) as source:
        if (source.adapter or adapts) and not merges:
            raise adapter_error()
        empty = source.on_meta(torch.float32, None)
    placed(reader, empty, like)


def adapter_error() -> ArgumentError:
    """Return the error for a model with an adapter."""
    return ArgumentError(
        "the model has an adapter, and a GGUF file holds the weights without it: merge it first (merge=True, --merge)"
    )


def write_gguf(
    path: Path,
    model: Any,
    tokenizer: Any,
    like: str | Path,
    *,
    at_least: str | None = None,
    label: str = "unlearned",
    bar: Progress | None = None,
) -> GgufReport:
    """Write the weights of a model as a GGUF file with the metadata, tokenizer and formats of another, and verify it.

    The file is read back: metadata and tokenizer are those of `like`, but for what describes the file itself; each
    tensor is the weights within the rounding of its format. One tensor at a time is in memory next to the model.

    Args:
        path: of the file; after an error it is there, incomplete or wrong, and its caller removes it.
        model: the transformers model, or one with wrappers.
        tokenizer: the model's, whose tokens are compared; or None.
        like: path of the GGUF file of the model as it was before.
        at_least: a format, for tensors that have a smaller one in `like`.
        label: what the model's name gets at its end.
        bar: the progress bar.

    Raises:
        ModelError: `like` is of another model or an unknown architecture; the weights cannot be written in its formats.
        ArgumentError: the model has an adapter that is not merged.
        DependencyError: without the package gguf.
    """
    inner = unwrapped(model)
    if hasattr(model, "peft_config") or hasattr(inner, "peft_config"):
        raise adapter_error()
    require_plain(inner)
    reader, bar = read_like(like), bar or Progress(False)
    tensors = placed(reader, inner, like, at_least)
    if problem := tokens_problem(reader, tokenizer):
        raise ModelError(f"the GGUF file {like} has another tokenizer: {problem}; give one of the model itself")
    metadata = _metadata(reader, tensors, label)
    different = _write(path, reader, tensors, metadata, like, bar)
    rounding = _verify(path, reader, tensors, metadata, bar)
    replaced = Counter(f"{t.source.tensor_type.name} -> {t.format}" for t in tensors)
    return GgufReport(
        path.name,
        Path(like).name,
        dict(Counter(t.format for t in tensors).most_common()),
        {change: n for change, n in replaced.most_common() if len(set(change.split(" -> "))) > 1},
        path.stat().st_size,
        Path(like).expanduser().stat().st_size,
        rounding,
        different,
    )


def require_plain(inner: Any) -> None:
    """Raise ModelError unless this process has all weights of a model, as floating-point numbers."""
    for name, weight in inner.state_dict(keep_vars=True).items():
        if weight.is_meta or is_part(weight):
            raise ModelError(
                f"a GGUF file needs all weights in one process, and {name} is offloaded or sharded: load the saved "
                "model whole first"
            )
        if not weight.is_floating_point():
            raise ModelError(
                f"a GGUF file needs weights that are not quantized yet, and {name} is: load the model without "
                "load_in_4bit (--load-in-4bit)"
            )


def _metadata(reader: Any, tensors: list[Placed], label: str) -> dict[str, tuple[Any, Any, Any]]:
    """Return key -> (value, type, type of the elements of a list) of a new file's metadata.

    It is that of the file that is read, strings as bytes, without what describes that file, and with another name, file
    type and maker. Empty lists, which the package gguf cannot write, are left out.
    """
    from pyunlearn import __version__

    gguf = package()
    kinds, values = gguf.GGUFValueType, {}
    for key, field in reader.fields.items():
        if key.startswith(("GGUF.", *_OF_ANOTHER)) or key in ("general.architecture", "general.alignment"):
            continue
        kind, *inner = field.types
        if kinds.ARRAY in inner:
            raise ModelError(f"the metadata {key} of the GGUF file are lists of lists, which cannot be copied")
        strings = field.types[-1] == kinds.STRING
        parts = [field.parts[i].tobytes() if strings else field.parts[i][0] for i in field.data]
        if kind != kinds.ARRAY or parts:
            values[key] = (parts if kind == kinds.ARRAY else parts[0], kind, inner[0] if inner else None)
    if "general.name" in values:
        name = bytes(values["general.name"][0]).decode("utf-8", "replace")
        ending = f" {label}"
        values["general.name"] = (f"{name.removesuffix(ending)}{ending}".encode(), kinds.STRING, None)
    values["general.quantized_by"] = (f"pyunlearn {__version__}".encode(), kinds.STRING, None)
    if any(t.format != t.source.tensor_type.name for t in tensors) and "general.file_type" in values:
        sizes: Counter[str] = Counter()
        for t in tensors:
            sizes[t.format] += t.weight.numel()
        most = sizes.most_common(1)[0][0]
        kind = gguf.LlamaFileType.ALL_F32 if most == "F32" else gguf.LlamaFileType[f"MOSTLY_{most}"]
        values["general.file_type"] = (int(kind), kinds.UINT32, None)
    return values


def _write(
    path: Path,
    reader: Any,
    tensors: list[Placed],
    metadata: dict[str, tuple[Any, Any, Any]],
    like: str | Path,
    bar: Progress,
) -> float | None:
    """Write the file; return the share of bytes that differ from the other file's, in tensors of the same format.

    Raises ModelError for weights that are not finite, or have nothing in common with the file's.
    """
    gguf = package()
    writer = gguf.GGUFWriter(path, value_of(reader, "general.architecture"))
    if "general.alignment" in reader.fields:
        writer.add_custom_alignment(int(reader.alignment))
    for key, (value, kind, of) in metadata.items():
        writer.add_key_value(key, value, kind, of)
    own = {t.name: t for t in tensors}
    for source in reader.tensors:
        kind = gguf.GGMLQuantizationType[own[source.name].format] if source.name in own else source.tensor_type
        block, size = gguf.GGML_QUANT_SIZES[kind]
        shape = source.shape.tolist()[::-1]
        writer.add_tensor_info(
            source.name, shape, np.dtype(np.float32), source.n_elements // block * size, raw_dtype=kind
        )
    bar.begin(f"writing {path.name}", len(reader.tensors))
    different = compared = 0
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for source in reader.tensors:
            stored = np.asarray(source.data)
            data = _packed(own[source.name], like) if source.name in own else stored
            if source.name in own and own[source.name].format == source.tensor_type.name:
                different += int((data.view(np.uint8).ravel() != stored.view(np.uint8).ravel()).sum())
                compared += source.n_bytes
            writer.write_tensor_data(data)
            bar.advance(1)
    finally:
        writer.close()
    return float(different / compared) if compared else None


def _packed(tensor: Placed, like: str | Path) -> NDArray[Any]:
    """Return the weights of a tensor in its format; see `_write`."""
    parts, products = [], np.zeros(3)
    for here, there in _rows(tensor, tensor.source):
        if not np.isfinite(here).all():
            raise ModelError(f"the model's weights for the tensor {tensor.name} are NaN or Inf: they are broken")
        parts.append(packed(here, tensor.format))
        if tensor.weight.ndim > 1:
            before = unpacked(there, tensor.source.tensor_type.name)
            products += [np.vdot(here, before), np.vdot(here, here), np.vdot(before, before)]
    product, *squares = products
    if all(squares) and product < _ALIKE * np.sqrt(np.prod(squares)):
        raise ModelError(
            f"the GGUF file {like} is of another model: its tensor {tensor.name} has a cosine of "
            f"{product / np.sqrt(np.prod(squares)):.2f} with the model's weights, and {_ALIKE} is wanted; give one of "
            "the model itself"
        )
    return np.concatenate(parts)


def _rows(tensor: Placed, stored: Any) -> Iterator[tuple[Floats, NDArray[Any]]]:
    """Yield (weights, the same rows as a file stores them), some rows of a tensor at a time; a vector is one row."""
    columns = tensor.weight.shape[-1]
    weights, there = tensor.weight.detach().reshape(-1, columns), stored.data.reshape(-1, stored.data.shape[-1])
    step = max(1, _ROWS // columns)
    for first in range(0, len(weights), step):
        yield weights[first : first + step].float().cpu().numpy(), there[first : first + step]


def _verify(
    path: Path,
    reader: Any,
    tensors: list[Placed],
    metadata: dict[str, tuple[Any, Any, Any]],
    bar: Progress,
) -> float:
    """Return the relative rounding of a file that was written.

    Raises ModelError where its metadata or a tensor is not what was to be written.
    """
    written = package().GGUFReader(path)
    for key, field in written.fields.items():
        if key in metadata and key not in _NAMES and _bytes(field) != _bytes(reader.fields[key]):
            raise ModelError(f"{path.name} was not written correctly: its metadata {key} are others")
    if lost := next((key for key in metadata if key not in written.fields), None):
        raise ModelError(f"{path.name} was not written correctly: its metadata {lost} are missing")
    there = {t.name: t for t in written.tensors}
    for source in reader.tensors:
        new = there.get(source.name)
        if new is None or new.shape.tolist() != source.shape.tolist():
            raise ModelError(f"{path.name} was not written correctly: its tensor {source.name} has another shape")
    bar.begin(f"reading {path.name} back", len(tensors))
    errors, squares = 0.0, 0.0
    for tensor in tensors:
        for here, stored in _rows(tensor, there[tensor.name]):
            error = np.abs(unpacked(stored, tensor.format) - here)
            if not (error <= largest_error(here, tensor.format)).all():  # NaN too
                raise ModelError(
                    f"the weights do not fit into a GGUF file like this one: {tensor.name} differs by more than the "
                    f"rounding of {tensor.format}; take one in another format, such as F32"
                )
            errors += float(np.vdot(error, error))
            squares += float(np.vdot(here, here))
        bar.advance(1)
    return float(np.sqrt(errors / squares)) if squares else 0.0


def _bytes(field: Any) -> bytes:
    """Return the value of a metadata field as it is stored, with its type."""
    return b"".join(part.tobytes() for part in field.parts[2:])
