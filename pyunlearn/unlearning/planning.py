"""Public function `plan`: the memory and the time of a run, before any weights are loaded."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pyunlearn.attacks.judge import non_members_for
from pyunlearn.data import Tokens, check_texts, read_roles
from pyunlearn.errors import ArgumentError, DependencyError, ModelError, brief
from pyunlearn.methods import resolve
from pyunlearn.models import gguf
from pyunlearn.models.adapters import require_mergeable, with_lora
from pyunlearn.models.config import LoadOptions
from pyunlearn.models.gguf_writing import require_like
from pyunlearn.models.language_model import LanguageModel, require_tokenizer
from pyunlearn.models.loading import load_options, present_options, require_loadable
from pyunlearn.models.outline import FourBits, outline
from pyunlearn.options import accepts, require_path
from pyunlearn.output import plain_json
from pyunlearn.probes.forms import with_forms
from pyunlearn.probes.renderings import render
from pyunlearn.unlearning.api import check_together, require_holdout
from pyunlearn.unlearning.config import UnlearnConfig
from pyunlearn.unlearning.forecast import ROBUST, Work, duration
from pyunlearn.unlearning.machines import (
    CONTEXT,
    CPU_UTILIZATION,
    GB,
    LIBRARIES,
    UTILIZATION,
    Machine,
    machine_of,
    measured_rate,
)
from pyunlearn.unlearning.parts import Memory, memory_of, static_parts, texts_of_retain_loss
from pyunlearn.unlearning.schedule import resolved_steps
from pyunlearn.unlearning.utility_set import evenly_spaced

_LORA = 16


@dataclass(frozen=True)
class Plan:
    """Memory and time that a run is expected to take, returned by `plan`."""

    model: str
    machine: Machine
    parameters: int
    trained: int
    """Parameters that are trained."""
    memory: Memory
    fits: bool | None
    """None where the machine's free memory is unknown."""
    options: dict[str, Any] | None
    """Options with which it fits, the cheapest: none where it fits as it is; None where no combination was found."""
    memory_then: Memory | None
    """Memory with these options."""
    steps: int
    """Expected optimizer steps, if every forget text is memorized."""
    most_steps: int
    """Largest number of optimizer steps."""
    seconds: float | None
    """Expected time of these steps and of the scores between them; None where the machine's speed is unknown."""
    basis: str
    """What the time is an estimate from."""

    @property
    def line(self) -> str:
        """One sentence: whether the run fits."""
        name, free = self.machine.name, self.machine.memory
        verb = "may fit" if self.fits is None else "fits" if self.fits else "does not fit"
        size = "memory unknown" if free is None else f"{free / GB:.1f} GB{' free' if self.machine.here else ''}"
        free_main = f" ({self.machine.main / GB:.1f} GB free)" if self.machine.main else ""
        main = f", and {self.memory.main / GB:.1f} GB of main memory{free_main}" if self.memory.main else ""
        of = "driver" if self.machine.device == "cuda" else "Python"
        reserve = f"{reserve_of(self.machine) / GB:.1f} GB for {of} and libraries"
        return f"{verb} {name} ({size}): about {self.memory.device / GB:.1f} GB, {reserve}{main}"

    @property
    def time_line(self) -> str:
        """One sentence: the expected time."""
        about = f"about {self.steps:,} steps (at most {self.most_steps:,}) if every text is memorized"
        return f"{about}: {self.basis}" if self.seconds is None else f"{about}, {duration(self.seconds)}: {self.basis}"

    def to_dict(self) -> dict[str, Any]:
        """Return name -> value in JSON's types."""
        content: dict[str, Any] = plain_json(self)
        return content


@accepts(UnlearnConfig)
def plan(
    model: str | Path,
    forget: Any,
    *,
    retain: Any = None,
    holdout: Any = None,
    tokenizer: Any = None,
    config: UnlearnConfig | str | Path | None = None,
    output_dir: str | Path | None = None,
    gpu: str | float | None = None,
    loading: LoadOptions | None = None,
    **settings: Any,
) -> Plan:
    """Plan a run of `unlearn`: its memory by part, whether it fits, the options that make it fit, the expected time.

    No weights are loaded: the configuration and the tokenizer are read, and a step on the longest texts is traced on
    the meta device. The memory is that of methods that read one text for each example, as the default does.

    Args:
        model: a folder, a .gguf file or a name on the Hugging Face hub.
        forget, retain, holdout: the texts, as `unlearn` takes them.
        tokenizer: a tokenizer, or where to load it from; default: that of the model.
        config: all settings in one object, or the path of a TOML file or a result.json; keywords replace single ones.
        output_dir: of the run; with one, a copy of the optimizer's moments is stored for checkpoints.
        gpu: a GPU by name (A100-80, H100-80, L4-24, ...) or its memory in GB; default: this machine.
        loading: dtype, 4-bit weights and other options with which the model is loaded.
        {options}

    Returns:
        Plan: `.memory`, `.fits`, `.options`, `.seconds`, `.to_dict()`.

    Raises:
        ArgumentError, DataError, ModelError: an argument cannot be used; the model's memory cannot be traced.
    """
    config = UnlearnConfig.of(config, settings, "plan")
    require_path("output_dir", output_dir)
    if not isinstance(model, (str, Path)):
        raise ModelError(f"model must be a path or a name, got a value of type {type(model).__name__}")
    require_path("model", model)
    require_tokenizer("tokenizer", tokenizer)
    if loading is not None and not isinstance(loading, LoadOptions):
        raise ArgumentError(f"loading must be a LoadOptions, got {brief(loading)}: leave it out for the defaults")
    machine = machine_of(gpu)
    method_options = dict(config.method_options or {})
    method, _ = resolve(config.method, config.retain_loss, retain is not None, method_options, has_reference=True)
    check_together(config, method, retain, model)  # the run may have a reference model
    sources = {"forget": forget, "retain": retain, "holdout": holdout}
    examples, _ = check_texts(read_roles(sources, turns=config.turns)[0])
    require_holdout(examples, config)
    require_loadable("model", model)
    with gguf.cached_headers() if str(model).endswith(".gguf") else nullcontext():
        case = _Case(model, tokenizer, loading or present_options(), config, machine, checkpoint=output_dir is not None)
        case.require_file()
        case.read(examples)
        memory = case.memory()
        assert memory is not None
        fits = _fits(memory, machine)
        options, then = ({}, memory) if fits is not False else _cheapest(case)
        work, most = _work(case, config)
        rate, basis = _rate(case)
        basis += f"; {ROBUST}" if config.robust else ""
        operations = work.trained * memory.operations_trained + work.scored * memory.operations_scored
    return Plan(
        str(model),
        machine,
        *case.counts(),
        memory,
        fits,
        options,
        then,
        work.steps,
        most,
        None if rate is None else work.steps * operations / rate,
        basis,
    )


class _Case:
    """A run that is planned: the model's outline, the tokens of its texts, the settings and the machine."""

    def __init__(
        self,
        model: str | Path,
        tokenizer: Any,
        loading: LoadOptions,
        config: UnlearnConfig,
        machine: Machine,
        *,
        checkpoint: bool,
    ) -> None:
        self.model, self.tokenizer, self.loading, self.config = model, tokenizer, loading, config
        self.machine, self.checkpoint = machine, checkpoint
        self.tokens: dict[str, list[Tokens]] = {}
        self.lm = self._outline()

    def _outline(self) -> LanguageModel:
        # the device is no matter, and `load_options` would look for it
        with load_options(replace(self.loading, device=None)):
            lm = outline(self.model, self.tokenizer)
        self.tokenizer = lm.tokenizer
        has_adapter = hasattr(lm.module, "peft_config")
        if self.config.merge and self.config.lora is None:
            require_mergeable(lm.module)
        if self.config.lora is not None:
            lm = with_lora(lm, self.config.lora, self.config.seed)
        elif not has_adapter and any(isinstance(m, FourBits) for m in lm.module.modules()):
            raise ArgumentError("4-bit weights do not train: add an adapter (lora=16, --lora 16)")
        return lm

    def read(self, examples: dict[str, Any]) -> None:
        """Tokenize the texts."""
        own = {role: each for role, each in examples.items() if role in ("forget", "retain", "holdout")}
        texts = render(self.lm, own, self.config.template, truncate=self.config.truncate)
        if self.config.scope == "person":
            texts = with_forms(self.lm, texts, non_members_for(self.config.false_discovery_rate))
        self.tokens = texts.tokens

    def require_file(self) -> None:
        """Raise an error, as the run does, where the GGUF file that it is for cannot be used."""
        if self.config.gguf_like is not None:
            with load_options(replace(self.loading, device=None)):
                adapts, merges = self.config.lora is not None, self.config.merge
                require_like(self.config.gguf_like, self.model, adapts=adapts, merges=merges)

    def changed(self, **options: Any) -> _Case:
        """Return the case with other options."""
        own = {name: value for name, value in options.items() if name in LoadOptions.options()}
        loading = replace(self.loading, **own)
        config = replace(self.config, **{name: value for name, value in options.items() if name not in own})
        if own or config.lora != self.config.lora:
            case = _Case(self.model, self.tokenizer, loading, config, self.machine, checkpoint=self.checkpoint)
            case.tokens = self.tokens
        else:
            case = copy.copy(self)
            case.config = config
        return case

    def memory(self, limit: int | None = None) -> Memory | None:
        """Return the memory of the run; None where what is there in any case exceeds the limit."""
        parts = static_parts(self.lm.module, self.config, self.machine.device, checkpoint=self.checkpoint)
        reserve = reserve_of(self.machine)
        if limit is not None and sum(part.device for part in parts) + reserve > limit:
            return None
        return memory_of(self.lm, self.tokens, self.config, self.machine, parts)

    def counts(self) -> tuple[int, int]:
        """Return the numbers of parameters and of trained ones."""
        own = {id(p): (_numbers(p, m), p.requires_grad) for m in self.lm.module.modules() for p in m.parameters(False)}
        return sum(n for n, _ in own.values()), sum(n for n, trains in own.values() if trains)


def _numbers(p: torch.nn.Parameter, module: torch.nn.Module) -> int:
    packed = isinstance(module, FourBits) and p is module.weight
    return module.in_features * module.out_features if packed else p.numel()  # type: ignore[operator, return-value]


def _fits(memory: Memory, machine: Machine) -> bool | None:
    """Return whether the run fits; None where the free memory is unknown."""
    if machine.memory is None:
        return None
    on_host = machine.main is None or memory.main + LIBRARIES <= machine.main
    return memory.device + reserve_of(machine) <= machine.memory and on_host


def reserve_of(machine: Machine) -> int:
    """Return the bytes of a device's memory that the run's tensors cannot have."""
    return CONTEXT if machine.device == "cuda" else LIBRARIES


def _cheapest(case: _Case) -> tuple[dict[str, Any] | None, Memory | None]:
    """Return the first combination of options that fits, and its memory."""
    dtype = next(p.dtype for p in case.lm.module.parameters() if p.is_floating_point())
    narrow = "bfloat16" if case.machine.bfloat16 else "float16"
    is_float32, on_gpu = dtype == torch.float32, case.machine.device == "cuda"
    for options in combinations(case.config, case.loading, is_float32=is_float32, narrow=narrow, on_gpu=on_gpu):
        if options.get("lora") and hasattr(case.lm.module, "peft_config"):
            return None, None
        try:
            memory = case.changed(**options).memory(case.machine.memory)
        except (ModelError, DependencyError, ArgumentError):
            # no layers that can be recomputed or adapted, no package peft, or moments_in_8bit without a bound
            continue
        if memory is not None and _fits(memory, case.machine):
            return options, memory
    return None, None


def combinations(
    config: UnlearnConfig, loading: LoadOptions, *, is_float32: bool, narrow: str = "bfloat16", on_gpu: bool = False
) -> Iterator[dict[str, Any]]:
    """Yield options that lower the memory, the cheapest first: time, then rounding, then an adapter, then 4 bits.

    On a GPU the moments in 8 bits come before the optimizer in the main memory, which slows each step.

    Args:
        config: the settings of the run; what they have already is left out.
        loading: the options with which the model is loaded.
        is_float32: whether the weights would be float32.
        narrow: the 16-bit dtype of the machine.
        on_gpu: whether the main memory is another than that of the device.
    """
    in_time: list[dict[str, Any]] = [{}, {"gradient_checkpointing": True}, {"micro_batch_size": 1}]
    in_time.append(in_time[1] | in_time[2])
    if on_gpu:
        for less in ({"moments_in_8bit": True}, {"offload_optimizer": True}):
            in_time += [less, in_time[1] | less, in_time[3] | less]
    narrower = {"dtype": narrow} if is_float32 else {}
    adapter: dict[str, Any] = {} if config.lora else {"lora": _LORA}
    if config.gguf_like is not None:
        adapter |= {} if config.merge else {"merge": True}
    in_quality: list[dict[str, Any]] = [{}, narrower, narrower | adapter]
    if not loading.load_in_4bit and config.gguf_like is None:
        in_quality.append(narrower | adapter | {"load_in_4bit": True})
    present = {name: getattr(config, name) for options in in_time for name in options}
    seen: list[dict[str, Any]] = [{}]
    for quality in in_quality:
        for time in in_time:
            options = quality | {name: value for name, value in time.items() if present[name] != value}
            if options not in seen:
                seen.append(options)
                yield options


def _work(case: _Case, config: UnlearnConfig) -> tuple[Work, int]:
    """Return the expected work of the run, and its largest number of steps."""
    forget, retain, holdout = (case.tokens.get(role, []) for role in ("forget", "retain", "holdout"))
    trained = texts_of_retain_loss(case.tokens, config)
    budgets = [retain] if retain else []
    if holdout and (not retain or config.holdout_budget is not None):
        budgets.append(holdout)  # the utility set where there is no retain set
    others = sum(len(texts[i]) for texts in budgets for i in evenly_spaced(texts, forget=len(forget)))
    forms = config.scope == "person"
    most = resolved_steps(config.max_steps, len(forget), config.batch_size, robust=config.robust, forms=forms)
    work = Work.of(
        [*map(len, forget)],
        [*map(len, trained)],
        others,
        memorized=len(forget),
        batch_size=config.batch_size,
        max_steps=most,
    )
    return work, most


def _rate(case: _Case) -> tuple[float | None, str]:
    """Return the operations a second that the run is assumed to reach, and how they are known."""
    machine = case.machine
    if machine.rate is not None:
        whole = machine.rate / UTILIZATION / 1e12
        return machine.rate, f"{UTILIZATION:.0%} of the {whole:,.0f} TFLOP/s of its data sheet, not measured"
    if not machine.here:
        return None, "the time is unknown, since its speed is"
    dtype = next(p.dtype for p in case.lm.module.parameters() if p.is_floating_point())
    width = case.lm.inner.get_input_embeddings().weight.shape[1]
    share = UTILIZATION if machine.device == "cuda" else CPU_UTILIZATION
    rate = measured_rate(max(map(len, case.tokens["forget"])) * case.config.batch_size, width, dtype)
    return share * rate, f"{share:.0%} of the {rate / 1e9:,.0f} GFLOP/s of a matrix product measured here"
