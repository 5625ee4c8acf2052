"""The function `audit`: measure what a model remembers of given texts, without changing it."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pyunlearn.attacks.api import attacked
from pyunlearn.attacks.config import DEFAULT, AttackConfig
from pyunlearn.attacks.judge import non_members_for
from pyunlearn.attacks.prepare import arranged, require_enough
from pyunlearn.attacks.result import AttackResult
from pyunlearn.auditing.assemble import AuditAssembler
from pyunlearn.auditing.config import AuditConfig
from pyunlearn.auditing.responses import AuditTexts, ResponseCollector, Responses
from pyunlearn.auditing.result import Audit
from pyunlearn.data import Example, check_texts, read_roles
from pyunlearn.data.redaction import masked
from pyunlearn.errors import ModelError
from pyunlearn.models.condition import to_device, weights_of
from pyunlearn.models.devices import default_device
from pyunlearn.models.harness import HarnessTasks, TaskRun, require_lm_eval, task_settings
from pyunlearn.models.language_model import LanguageModel, require_model, require_tokenizer
from pyunlearn.options import Flag, accepts, require
from pyunlearn.output import model_name, versions
from pyunlearn.probes.cache import require_cache
from pyunlearn.probes.forms import require_forms, with_forms
from pyunlearn.probes.non_members import non_members_of_holdout, unsuitable
from pyunlearn.probes.renderings import RenderedTexts, likeliest, render
from pyunlearn.probes.tasks import task_notes, task_scores
from pyunlearn.progress import Progress, logger
from pyunlearn.unlearning.result import document_notes


@accepts(AuditConfig)
def audit(
    model: Any,
    forget: Any,
    *,
    holdout: Any = None,
    retain: Any = None,
    original: Any = None,
    reference_model: Any = None,
    tokenizer: Any = None,
    cache: str | Path | None = None,
    config: AuditConfig | str | Path | None = None,
    progress: bool | None = None,
    **settings: Any,
) -> Audit:
    """Measure what a language model remembers of the forget texts: a verdict for each, and the numbers behind it.

    With `model` and `forget` alone it answers whether they are memorized: which of them stand out among text that was
    not trained on, by their *generalized exposure*, at a false discovery rate over all of them (a single text: 4.32
    bits). With `original`, the model before unlearning, it answers whether they are forgotten: the exposures are then
    *anchored*, with the non-members scored under the original model, before and after alike; what still stands out is
    seen among those under the model itself (`metrics.left`), and a text that neither stands out nor is forgotten is
    undecided. The model is not changed.

    Each model reads each text once, and all teacher-forced metrics come from that one pass. Prompted answers are read
    once more without the prompt (`answer_prior`), and continuations are decoded greedily (the slow part).

    Args:
        model: a transformers causal or encoder-decoder language model, or a path, a .gguf file or a name to load from.
        forget: the texts in question: a text, a list of texts or dicts, a datasets.Dataset, or a path.
        holdout: text of the same kind that was not trained on, same forms; 19 different texts or more, none of them a
            copy of a forget text. Default: texts written for this package, each score less what is expected of unseen
            text like it, or where these cannot serve text sampled from the reference model, the original model or else
            the model; then membership attacks are left out, since neither is a fair comparison.
        retain: text that must keep working, same forms: its likelihood is reported, with an interval.
        original: the model before unlearning, same forms as `model`.
        reference_model: a model that never saw the forget texts, best one retrained without them, or the one before
            fine-tuning: each score is the model's less the reference model's of the same text. It also calibrates a
            membership score, and PrivLeak is measured against it.
        tokenizer: the model's, or where it is. Default: where the model came from.
        cache: folder of each model's outputs, by hash of weights and text: an interrupted audit resumes, a second one
            takes no passes. It can give the texts back, and nobody else can read it; treat it as you treat the texts.
        config: an AuditConfig, or a TOML file or audit.json to read one from; keywords change single settings of it.
        progress: a progress bar on standard error. Default: where that is a terminal.
        {options}

    Returns:
        Audit: `.examples` (a verdict each; with scope="person" also on each other form of a text), `.passed`,
        `.verdicts`, `.non_members`, `.membership`, `.utility`, `.tasks`, `.to_dict()`.

    Raises:
        ArgumentError, DataError, ModelError, OutputError, DependencyError: an argument that cannot be used.

    Source: exposure after Carlini et al. 2019 (arXiv 1802.08232) and Baluta et al. 2024 (arXiv 2411.04388), our
    formalisation; the source of each metric is in docs/metrics.md.
    """
    began = time.perf_counter()
    config = AuditConfig.of(config, settings, "audit")
    models = {"model": model, "original": original, "reference_model": reference_model}
    _check(models, tokenizer, cache, progress)
    if config.tasks is not None:
        require_lm_eval()
    sources = {"forget": forget, "retain": retain, "holdout": holdout}
    examples, drawn = read_roles(sources, turns=config.turns)
    examples, notes = check_texts(examples)
    if config.scope == "person":
        require_forms(examples, non_members_for(config.false_discovery_rate))
    if config.attacks is not None and "holdout" in examples:
        require_enough(len(examples["holdout"]), config.false_discovery_rate)
    notes = drawn + notes
    for name, each in models.items():
        if each is not None:
            require_model(name, each)
    bar = Progress(progress, "auditing")
    try:
        tasks = None
        if config.tasks is not None:
            first = model if original is None else original
            tasks = HarnessTasks(config.tasks, config.task_limit, first, tokenizer, bar)
        collected = _collect(models, tokenizer, examples, config, cache, bar, tasks)
        bar.say("computing the metrics")
        result = AuditAssembler(
            collected.texts, collected.tokenizer, config, collected.now, collected.before, collected.retrained
        ).assemble()
        if config.attacks is not None:
            result.attack = _attacked(models, collected, config, bar)
        if collected.tasks_now is not None:
            result.tasks = task_scores(collected.tasks_now, collected.tasks_before, seed=config.seed)
            result.notes += task_notes(collected.tasks_now)
    finally:
        bar.close()
    result.settings = versions() | {name: model_name(each) for name, each in models.items()} | config.to_dict()
    result.settings |= task_settings(config.tasks) | {"weights": collected.weights["model"]}
    memorized = any(e.verdict != "not memorized" for e in result.examples)
    result.notes = notes + collected.rendered.notes(memorized=memorized) + result.notes
    result.notes += document_notes(result.documents)
    result.rendering = collected.rendered.name
    result.seconds = time.perf_counter() - began
    return result


def _attacked(models: dict[str, Any], collected: Collected, config: AuditConfig, bar: Progress) -> AttackResult:
    """Try the attacks on the model; the reference model is their control, and the original is there to merge with."""
    settings = AttackConfig(
        attacks=config.attacks or DEFAULT,
        false_discovery_rate=config.false_discovery_rate,
        batch_size=max(1, config.batch_size // 4),
        workspace=config.workspace,
        seed=config.seed,
    )
    if collected.texts.non_members.by_reference is False:  # it is the model itself, and was not used
        models = models | {"reference_model": None}
    lm, original, control = (
        None if models[name] is None else _loaded(models[name], collected.tokenizer, config)
        for name in ("model", "original", "reference_model")
    )
    assert lm is not None
    inputs = arranged(lm, collected.rendered.as_written, settings, bar, control=control, original=original)
    read = {
        t: x.astype(np.float64)
        for role in ("forget", "non_members")
        for t, x in zip(collected.texts.tokens[role], collected.now.log_likelihoods(role), strict=True)
    }
    return attacked(inputs, settings, bar, read)


def _loaded(model: Any, tokenizer: Any, config: AuditConfig) -> LanguageModel:
    """Return a model with its tokenizer, on the device of the commands where it is loaded here."""
    lm = LanguageModel.of(model, tokenizer, workspace=config.workspace)
    if isinstance(model, (str, Path)):
        to_device(lm.module, default_device())
    return lm


def _check(models: dict[str, Any], tokenizer: Any, cache: Any, progress: Any) -> None:
    """Raise for an argument that cannot be used, before any text is read or name is looked up."""
    first: tuple[str, int] | None = None
    for name, model in models.items():
        if model is None and name != "model":
            continue
        require_model(name, model, look_up=False)
        if not isinstance(model, (str, Path)):
            vocabulary = LanguageModel.of(model, needs_tokenizer=False).vocabulary
            first = first or (name, vocabulary)
            _require_vocabulary(name, vocabulary, *first)
    require_tokenizer("tokenizer", tokenizer)
    require_cache("cache", cache)
    if progress is not None:
        require(Flag(), progress=progress)


def _require_vocabulary(name: str, vocabulary: int, first: str, wanted: int) -> None:
    if vocabulary != wanted:
        raise ModelError(
            f"{name} has another vocabulary than {first}, {vocabulary} tokens and not {wanted}: give one of the same "
            "family"
        )


class Collected(NamedTuple):
    """The texts of an audit, and the outputs of each model."""

    texts: AuditTexts
    rendered: RenderedTexts
    tokenizer: Any
    now: Responses
    before: Responses | None
    retrained: Responses | None
    tasks_now: TaskRun | None
    tasks_before: TaskRun | None
    weights: dict[str, str]
    """Name of a model -> the number format of its weights."""


def _collect(
    models: dict[str, Any],
    tokenizer: Any,
    examples: dict[str, list[Example]],
    config: AuditConfig,
    cache: str | Path | None,
    bar: Progress,
    tasks: HarnessTasks | None,
) -> Collected:
    """Run the original, the model and the reference model, one after the other: only one needs to be in memory.

    Where the reference model has to write the non-members, it is read before the others. Tasks are run on the original
    and the model as soon as each is loaded: one that ends with an error does so before the texts are read.
    """

    def ran_tasks(lm: LanguageModel, who: str) -> TaskRun | None:
        return None if tasks is None else tasks.run(lm, batch_size=max(1, config.batch_size // 4), bar=bar, who=who)

    weights: dict[str, str] = {}

    def collector_of(name: str, tokenizer: Any) -> ResponseCollector:
        bar.say("loading")
        lm = _loaded(models[name], tokenizer, config)
        weights[name] = weights_of(lm.module)
        return ResponseCollector(lm, cache=cache, batch_size=config.batch_size, bar=bar)

    def reference_collector() -> ResponseCollector:
        collector = collector_of("reference_model", tokenizer)
        _require_vocabulary("reference_model", collector.lm.vocabulary, first, vocabulary)
        return collector

    first = "model" if models["original"] is None else "original"
    collector = collector_of(first, tokenizer)
    tokenizer, vocabulary = collector.lm.tokenizer, collector.lm.vocabulary
    tasks_now, tasks_before = (
        ran_tasks(collector.lm, "the original model" if first == "original" else "the model"),
        None,
    )
    rendered = _in_best_form(collector, examples, config, "the model" if first == "model" else "the original model")
    examples, tokens = rendered.examples, rendered.tokens
    forget = tokens["forget"]
    has_reference, has_holdout = models["reference_model"] is not None, "holdout" in tokens
    writes = has_reference and not has_holdout and bool(unsuitable(collector.lm, examples["forget"], reads_head=False))
    if writes:
        del collector
        collector = reference_collector()
    if has_holdout:
        others = rendered.encoded.other_forms
        non_members = non_members_of_holdout(len(forget), tokens["holdout"], others)
    else:
        template = rendered.rendering.chat_template
        non_members = collector.non_members(
            examples["forget"], forget, config.seed, chat_template=template, is_reference=has_reference
        )
    answer_prior = "answer_prior" in config.metrics
    texts = AuditTexts.of(collector.lm, rendered.encoded, non_members, answer_prior=answer_prior)
    retrained: Responses | None = None
    if writes:
        retrained = collector.collect(texts, "the reference model", roles=("forget", "non_members"))
        del collector
        collector = collector_of(first, tokenizer)
    indices = list(range(len(texts.openings))) if "continuations" in config.metrics else []
    budget = config.budget

    before: Responses | None = None
    if first == "original":
        before = collector.collect(texts, "the original model", indices=indices, budget=budget)
        indices, budget = list(before.continuations), None
        del collector
        collector = collector_of("model", tokenizer)
        _require_vocabulary("model", collector.lm.vocabulary, first, vocabulary)
        tasks_now, tasks_before = ran_tasks(collector.lm, "the model"), tasks_now
    now = collector.collect(texts, "the model", indices=indices, budget=budget)
    if has_reference and retrained is None:
        del collector
        retrained = reference_collector().collect(texts, "the reference model", roles=("forget", "non_members"))
    if retrained is not None:
        texts = texts.calibrated(before or now, retrained)
    return Collected(texts, rendered, tokenizer, now, before, retrained, tasks_now, tasks_before, weights)


def _in_best_form(
    collector: ResponseCollector, examples: dict[str, list[Example]], config: AuditConfig, who: str
) -> RenderedTexts:
    """Return the texts in the rendering that `template` says, chosen here where it is auto; log an example.

    With scope="person" they have their other forms.
    """
    lm = collector.lm
    texts = render(lm, examples, config.template, truncate=config.truncate)
    if config.template == "auto" and texts.name is not None:
        collector.bar.say("comparing forms of the records")
        score = functools.partial(collector.token_log_likelihood, who=who)
        texts = likeliest(lm, texts, score, truncate=config.truncate)
    if line := texts.example_line(lm, change=str if config.show_text else masked):
        logger.info(line)
    if config.scope == "person":
        return with_forms(lm, texts, non_members_for(config.false_discovery_rate))
    return texts
