"""TokenBatch -> token log-likelihoods: the only file that knows how a transformers model is put together.

The fast path never makes logits. It lets the model run with its output head replaced by the identity, so what the head would have read
comes out untouched, whatever the architecture does before it (OPT's projection, T5's d_model ** -0.5); what a model does to logits after the head
(Gemma 2's softcap, Cohere's and Granite's scales) is read off its config. The first batch of a run is computed both ways. If they disagree beyond
rounding, the model's own logits are used from then on, and one warning says why.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyunlearn import _gguf
from pyunlearn._distributions import Distributions, Head
from pyunlearn.data import TokenBatch
from pyunlearn.errors import ModelError
from pyunlearn.ops import _backend
from pyunlearn.ops.example_objective import ExampleObjective, example_objective, objective_of
from pyunlearn.ops.linear_log_likelihood import linear_log_likelihood
from pyunlearn.ops.log_likelihood import log_likelihood
from pyunlearn.ops.token_objective import TokenObjective, token_objective, tokens_objective_of
from pyunlearn.ops.token_statistics import TokenStatistics, token_statistics, token_statistics_from_logits


def load(name: str | Path, *, dtype: torch.dtype = torch.float32, tokenizer: Any = None) -> tuple[Any, Any]:
    """The model and tokenizer behind a name or path; a path to a .gguf file is dequantized.

    Raises ModelError when nothing can be loaded from there, or what is there writes no text.
    """
    if not str(name).endswith(".gguf"):
        return _load(str(name), {}, name, dtype, tokenizer)
    with _gguf.read_once():
        return _load(str(Path(name).parent), {"gguf_file": Path(name).name}, name, dtype, tokenizer)


def _load(where: str, extra: dict[str, str], name: str | Path, dtype: torch.dtype, tokenizer: Any) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    if (
        not extra
        and Path(where).exists()
        and not (Path(where) / "config.json").exists()
        and not (Path(where) / "adapter_config.json").exists()
    ):
        raise ModelError(
            f"{where} holds no config.json, so it is no saved model: give the folder that save_pretrained wrote"
        )
    try:
        adapter = Path(where) / "adapter_config.json"
        base = json.loads(adapter.read_text()).get("base_model_name_or_path") if adapter.exists() else None
        config = AutoConfig.from_pretrained(base or where, **extra)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model, loading = kind.from_pretrained(base or where, dtype=dtype, output_loading_info=True, **extra)
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"no language model could be loaded from {name!s}: {first}") from error
    if extra:
        _gguf.dequantized(model)
    head = model.get_output_embeddings()
    names = {n for n, p in model.named_parameters(remove_duplicate=False) if p is getattr(head, "weight", None)}
    if names and names <= set(loading["missing_keys"]):  # transformers makes one up, at random, and goes on
        raise ModelError(
            f"the model saved in {name!s} has no language-model head, so it gives text no probability: give one that was saved with it"
        )
    if base:
        model = _with_adapter(model, where)
    if tokenizer is None or isinstance(tokenizer, (str, Path)):
        tokenizer = load_tokenizer(tokenizer or where, **({} if tokenizer else extra))
    return model, tokenizer


def _with_adapter(model: Any, where: str) -> Any:
    """The model with the PEFT adapter saved there, which trains; transformers alone would load it frozen."""
    try:
        from peft import PeftModel

        return PeftModel.from_pretrained(model, where, is_trainable=True, autocast_adapter_dtype=False).eval()
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"the adapter in {where} could not be loaded: {first}") from error


def load_tokenizer(name: str | Path, **extra: Any) -> Any:
    """The tokenizer behind a name or path. Raises ModelError when there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(name), **extra)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"no tokenizer could be loaded from {name!s}: give the one the model was trained with (tokenizer=, --tokenizer)"
        ) from error


def tokenizer_of(model: Any, tokenizer: Any = None) -> Any:
    """The tokenizer given, or the one that lies where it says or where the model came from. Raises ModelError when there is none."""
    if tokenizer is not None and not isinstance(tokenizer, (str, Path)):
        return tokenizer
    where = str(tokenizer or getattr(unwrapped(model), "name_or_path", "") or "")
    if where:
        return load_tokenizer(where)
    raise ModelError(
        "the model does not say where its tokenizer is: pass tokenizer=, the one the model was trained with"
    )


def unwrapped(model: nn.Module) -> Any:
    """The transformers model inside DDP, a PEFT wrapper or torch.compile."""
    seen: Any = model
    while True:
        if hasattr(seen, "_orig_mod"):
            seen = seen._orig_mod
        elif type(seen).__name__ in ("DistributedDataParallel", "DataParallel"):
            seen = seen.module
        elif hasattr(seen, "get_base_model"):
            seen = seen.get_base_model()
        else:
            return seen


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model reads with an encoder and writes with a decoder (T5) or does both in one (GPT)."""
    return bool(getattr(unwrapped(model).config, "is_encoder_decoder", False))


def decoder_start_id(model: nn.Module) -> int | None:
    """The token a decoder starts from, for encoder-decoder models."""
    config = unwrapped(model).config
    return next(
        (
            i
            for i in (getattr(config, "decoder_start_token_id", None), getattr(config, "pad_token_id", None))
            if i is not None
        ),
        0,
    )


def context_length(model: nn.Module) -> int | None:
    """The longest sequence the model has positions for, or None where it has no limit of its own (T5)."""
    config = _text_config(unwrapped(model).config)
    both = is_encoder_decoder(model)  # T5's n_positions limits nothing
    for name in (
        ("max_position_embeddings",)
        if both
        else ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    ):
        length = getattr(config, name, None)
        if isinstance(length, int) and length > 0:
            return length
    return None


def require_language_model(model: nn.Module) -> None:
    """Raises ModelError unless the model is a transformers one with a language-model head."""
    inner = unwrapped(model)
    if not hasattr(inner, "config") or not hasattr(inner, "get_output_embeddings"):
        raise ModelError(f"model must be a transformers language model, a path or a name, got {type(model).__name__}")
    if inner.get_output_embeddings() is None:
        raise ModelError(
            f"{type(inner).__name__} has no language-model head, so it gives text no probability: load it with AutoModelForCausalLM "
            "or AutoModelForSeq2SeqLM instead"
        )


class Likelihood:
    """Token log-likelihoods of batches under one model: `Likelihood(model)(batch)` -> (n,) float32, nats, in the order of batch.rows.

    `fused` says whether the fast path is used; it is None until the first batch has been computed both ways.
    """

    def __init__(self, model: Any, *, workspace: int | None = None) -> None:
        require_language_model(model)
        _backend.kernels_for(
            next(unwrapped(model).parameters())
        )  # a backend that cannot be had is said here, not held against the model later
        self.model: Any = model
        self.workspace = workspace
        self.fused: bool | None = None

    def __call__(self, batch: TokenBatch) -> Tensor:
        """(n,) log-likelihoods of batch.targets; differentiable."""
        if self.fused is None:
            self._choose(batch)
        return self._from_hidden(batch) if self.fused else self._from_logits(batch)

    def objective(
        self, batch: TokenBatch, function: Callable[..., Tensor], *per_example: Tensor, group_size: int = 1, top_fraction: float = 1.0,
        temperature: float = 1.0, weights: Tensor | None = None,
    ) -> ExampleObjective:  # fmt: skip
        """The sum over the batch's examples of function(summed log-likelihood (b,), scored tokens (b,), *per_example): see ops.example_objective.

        temperature: the log-likelihoods are those of logits / temperature. weights: (n,) factors on batch.targets' in the sums.
        """
        if self.fused is None:
            self._choose(batch)
        if not self.fused:
            live = torch.ones_like(batch.targets, dtype=torch.bool)
            found, count = self._from_logits(batch, temperature), len(batch.counts)
            return objective_of(
                found, live, batch.example, count, function, per_example, group_size, top_fraction, weights
            )
        hidden, head = self.hidden(batch)
        return example_objective(
            hidden, head.weight, batch.targets, batch.example, function, *per_example, bias=head.bias,
            logit_scale=head.logit_scale / temperature, softcap=head.softcap and head.softcap / temperature, workspace=self.workspace,
            group_size=group_size, top_fraction=top_fraction, weights=weights, ignore_index=None,
        )  # fmt: skip

    def token_objective(
        self, batch: TokenBatch, function: Callable[..., Tensor], *per_token: Tensor, group_size: int = 1, temperature: float = 1.0
    ) -> TokenObjective:  # fmt: skip
        """The sum over the batch's examples of function(log-likelihood (m,), example (m,), counts (b,), *per_token): see ops.token_objective."""
        if self.fused is None:
            self._choose(batch)
        if not self.fused:
            live = torch.ones_like(batch.targets, dtype=torch.bool)
            found, count = self._from_logits(batch, temperature), len(batch.counts)
            return tokens_objective_of(found, live, batch.example, count, function, per_token, group_size)
        hidden, head = self.hidden(batch)
        return token_objective(
            hidden, head.weight, batch.targets, batch.example, function, *per_token, bias=head.bias,
            logit_scale=head.logit_scale / temperature, softcap=head.softcap and head.softcap / temperature, workspace=self.workspace,
            examples=len(batch.counts), group_size=group_size, ignore_index=None,
        )  # fmt: skip

    @torch.no_grad()
    def statistics(self, batch: TokenBatch) -> TokenStatistics:
        """Log-likelihood, rank, entropy and variance of each of batch.targets, (n,): see ops.token_statistics."""
        if self.fused is None:
            self._choose(batch)
        if not self.fused:
            return token_statistics_from_logits(self._logits(batch), batch.targets)
        hidden, head = self.hidden(batch)
        return token_statistics(
            hidden, head.weight, batch.targets, bias=head.bias, logit_scale=head.logit_scale, softcap=head.softcap,
            ignore_index=None, workspace=self.workspace,
        )  # fmt: skip

    def distributions(self, batch: TokenBatch) -> Distributions:
        """The whole distribution at each of batch.rows; differentiable."""
        if self.fused is None:
            self._choose(batch)
        if not self.fused:
            return Distributions(self._logits(batch), None, self.workspace)
        return Distributions(*self.hidden(batch), self.workspace)

    def greedy_matches(self, batch: TokenBatch) -> Tensor:
        """(n,) bool: whether each target is the model's first choice there."""
        return self.statistics(batch).rank == 0

    def _from_hidden(self, batch: TokenBatch) -> Tensor:
        hidden, head = self.hidden(batch)
        return linear_log_likelihood(
            hidden, head.weight, batch.targets, bias=head.bias, logit_scale=head.logit_scale, softcap=head.softcap,
            ignore_index=None, workspace=self.workspace,
        )  # fmt: skip

    def _from_logits(self, batch: TokenBatch, temperature: float = 1.0) -> Tensor:
        return log_likelihood(self._logits(batch), batch.targets, logit_scale=1 / temperature)

    def _logits(self, batch: TokenBatch) -> Tensor:
        logits = self.model(**inputs_of(batch)).logits
        return logits.flatten(0, 1).index_select(0, batch.rows)

    def hidden(self, batch: TokenBatch) -> tuple[Tensor, Head]:
        """What the head would read at the scored rows, (n, D), and the head, which must be one that `head_problem` lets pass."""
        inner = unwrapped(self.model)
        module = inner.get_output_embeddings()
        with _captured(module) as captured:
            self.model(**inputs_of(batch))
        return captured[0].flatten(0, 1).index_select(0, batch.rows), _head(inner, module)

    @torch.no_grad()
    def _choose(self, batch: TokenBatch) -> None:
        """Compares both paths on the batch's first example, without dropout, and settles which is used."""
        name = type(unwrapped(self.model)).__name__
        problem = head_problem(self.model)
        if problem is None:
            one = _first_example(batch)
            training = self.model.training
            self.model.eval()
            try:
                own = self._logits(one)
                fast, slow = self._from_hidden(one), log_likelihood(own, one.targets)
            except (RuntimeError, IndexError, AttributeError, TypeError, ValueError) as error:
                problem = f"its forward does not run without its head ({(str(error).splitlines() or [''])[0]})"
            else:
                # a logit is good to about its dtype's epsilon times the largest of its row
                device = own.device.type
                dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else own.dtype
                rounding = 8 * torch.finfo(dtype).eps * max(1.0, float(own.float().abs().max())) + 1e-4
                apart = float((fast - slow).abs().max()) if fast.numel() else 0.0
                if not apart <= rounding:
                    problem = (
                        f"log-likelihoods from its head differ from those of its own logits by up to {apart:.3g} nats"
                    )
            finally:
                self.model.train(training)
        self.fused = problem is None
        if problem:
            warnings.warn(
                f"{name}: {problem}. The run uses the model's own logits: right, but slower and with more memory.",
                stacklevel=4,
            )


def head_problem(model: nn.Module) -> str | None:
    """Why the fused path cannot serve this model's head, as half a sentence, or None."""
    module: Any = unwrapped(model).get_output_embeddings()
    if type(module) is not nn.Linear:
        return (
            f"its head is a {type(module).__name__}, not a plain linear layer (an adapter or quantization on the head?)"
        )
    if type(module.weight).__name__ == "DTensor" or module.weight.is_meta:
        return "its head is spread over several devices"
    return None


def _head(inner: Any, module: Any) -> Head:
    config = _text_config(inner.config)
    scale = 1.0
    if getattr(config, "logits_scaling", None):  # Granite divides
        scale = 1.0 / float(config.logits_scaling)
    if getattr(config, "logit_scale", None):  # Cohere multiplies
        scale = float(config.logit_scale)
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return Head(module.weight, module.bias, scale, float(cap) if cap else None)


def _text_config(config: Any) -> Any:
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def inputs_of(batch: TokenBatch) -> dict[str, Any]:
    """What a transformers model is called with."""
    inputs: dict[str, Any] = {"input_ids": batch.ids, "attention_mask": batch.attention_mask, "use_cache": False}
    if batch.decoder_ids is not None:
        inputs["decoder_input_ids"] = batch.decoder_ids
    return inputs


def _first_example(batch: TokenBatch) -> TokenBatch:
    mine = batch.example == 0
    return replace(
        batch, ids=batch.ids[:1], attention_mask=batch.attention_mask[:1], rows=batch.rows[mine], targets=batch.targets[mine],
        example=batch.example[mine], counts=batch.counts[:1], decoder_ids=None if batch.decoder_ids is None else batch.decoder_ids[:1],
    )  # fmt: skip


@contextmanager
def _captured(module: nn.Module) -> Iterator[list[Tensor]]:
    """While it lasts, the module returns its input, and the list holds it."""
    captured: list[Tensor] = []

    def identity(x: Tensor, *_: Any, **__: Any) -> Tensor:
        captured[:] = [x]
        return x

    had, before = "forward" in vars(module), module.forward
    module.forward = identity  # type: ignore[method-assign]
    try:
        yield captured
    finally:
        if had:
            module.forward = before  # type: ignore[method-assign]
        else:
            del module.forward
