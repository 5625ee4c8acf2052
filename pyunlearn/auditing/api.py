"""The audit: what a model remembers of given texts, measured without changing it.

The function is `pyunlearn.audit`; the module has another name, so that neither hides the other.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyunlearn import models
from pyunlearn.auditing.assemble import Evidence
from pyunlearn.auditing.config import AuditConfig
from pyunlearn.auditing.responses import Asked, Asker, Places, likeliest, opening
from pyunlearn.auditing.result import Audit
from pyunlearn.data import Tokens, padding_id, read_examples
from pyunlearn.data.examples import Example
from pyunlearn.errors import ArgumentError, nearest
from pyunlearn.metrics import NULL_MEAN, SIGNIFICANT
from pyunlearn.models.inspection import vocabulary_of
from pyunlearn.models.loading import encoded, opened
from pyunlearn.models.sampling import require_enough
from pyunlearn.options import accepts
from pyunlearn.output import model_name, versions
from pyunlearn.probes import without_prompt
from pyunlearn.progress import Progress

METRICS = ("answer_prior", "continuations", "membership")
"""What can be left out of an audit; likelihood, exposure, memorization and the verdicts are always there."""


def _audit(
    model: Any,
    forget: Any,
    *,
    holdout: Any = None,
    retain: Any = None,
    original: Any = None,
    reference_model: Any = None,
    tokenizer: Any = None,
    metrics: Sequence[str] = METRICS,
    budget: int | None = None,
    until: float = NULL_MEAN,
    batch_size: int = 32,
    truncate: bool = False,
    workspace: int | None = None,
    cache: str | Path | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Audit:
    """Measures what a language model remembers of the forget texts: a verdict for each, and the evidence. The model is not changed.

    With nothing but `model` and `forget` it answers whether they are memorized: a text is, when it is likelier than 95 % of text that was never
    trained on (its *generalized exposure* reaches 4.32 bits). With `original`, the model as it was before unlearning, it answers whether they are
    forgotten: the exposures are then *anchored*, with references scored under the original, before and after alike.

    Every text is read once by each model, and all that is teacher-forced follows from that one pass: likelihood, exposure, exact memorization,
    extraction strength, membership scores, utility. Answers to prompts are read once more without the prompt (`answer_prior`), and what the model writes by
    itself is decoded greedily (`continuations`, the slow part).

    Args:
        model: a transformers causal or encoder-decoder language model, or a path, a .gguf file or a name to load one from.
        forget: the texts in question: a text, a list of texts or dicts, a datasets.Dataset, or a path; see `pyunlearn.unlearn`.
        holdout: text of the same kind that was never trained on, same forms; 19 texts or more. Default: sampled from the original model, or else
            from the model itself; then nothing is said about membership attacks, for sampled text is no fair comparison.
        retain: text that must keep working, same forms: its likelihood is reported, with an interval.
        original: the model before unlearning, same forms as `model`.
        reference_model: one that never saw the forget texts, the same but for them at best (retrained): it calibrates a membership score, and PrivLeak is
            measured against it.
        tokenizer: needed when `model` is a model object whose name leads to none.
        metrics: which of METRICS to take beside likelihood, exposure and memorization, which are always taken.
        budget: of how many texts the continuation is written, at most; those that are likely recited, by the original where it is given
            (`pyunlearn.metrics.audit_order`). All texts are read, and get a verdict. Default: all of them.
        until: bits of anchored exposure at which a memorized text counts as forgotten, as in `pyunlearn.unlearn`.
        batch_size: texts in one pass.
        truncate: cut examples that are longer than the model's context, instead of refusing them.
        workspace: bytes for kept logits, see `pyunlearn.ops.token_statistics`.
        cache: folder where each model's answers are kept, by hash of weights and text: an interrupted audit goes on, a second one takes no passes.
            It holds token ids of continuations; treat it as you treat the texts.
        seed: of sampling and bootstrap; the same seed gives the same audit.
        progress: a progress bar on standard error; default: if that is a terminal.

    Returns:
        Audit: `.examples` (a verdict each), `.passed`, `.verdicts`, `.references`, `.membership`, `.utility`, `.to_dict()`.

    Raises:
        ArgumentError, DataError, ModelError, OutputError: something given cannot be used.

    Source: exposure after Carlini et al. 2019 (arXiv 1802.08232) and Baluta et al. 2024 (arXiv 2411.04388), our formalisation; each metric's own is
    in docs/metrics.md.
    """
    began = time.perf_counter()
    _check(metrics, until, batch_size, budget)
    sources = {"forget": forget, "retain": retain, "holdout": holdout}
    examples = {role: read_examples(source, role=role) for role, source in sources.items() if source is not None}
    bar = Progress(progress, "auditing")
    try:
        bar.say("loading")
        first, tokenizer = opened(
            model if original is None else original, tokenizer, name="model" if original is None else "original"
        )
        vocabulary, passes = vocabulary_of(first), {}
        options: dict[str, Any] = {"cache": cache, "workspace": workspace, "batch_size": batch_size, "bar": bar}
        tokens = encoded(first, tokenizer, examples, truncate)
        asker = Asker(first, tokenizer, **options)
        references = tokens["holdout"] if holdout is not None else asker.sample(tokens["forget"], seed)
        require_enough(references, holdout=holdout is not None)
        texts = _questions(tokens, references, examples["forget"], first, tokenizer, metrics)
        openings = [opening(t, bool(e.prompt)) for t, e in zip(tokens["forget"], examples["forget"], strict=True)]
        places: Places = list(range(len(openings))) if "continuations" in metrics else []
        if places and budget is not None and budget < len(openings):
            places = likeliest(openings, [e.completion for e in examples["forget"]], budget)

        # one model after the other, so that no two need to be in memory: the original, the model, the reference model
        before: Asked | None = None
        if original is not None:
            before = asker.ask(texts, openings, places, "the original model")
            places = list(before.continuations)
            passes["original"] = before.passes
            del asker, first
            first, _ = opened(model, tokenizer, vocabulary=vocabulary)
            asker = Asker(first, tokenizer, **options)
        now = asker.ask(texts, openings, places, "the model")
        passes["model"] = now.passes
        retrained: Asked | None = None
        if reference_model is not None:
            del asker, first
            first, _ = opened(reference_model, tokenizer, vocabulary=vocabulary, name="reference_model")
            asked = {role: texts[role] for role in ("forget", "references")}
            retrained = Asker(first, tokenizer, **options).ask(asked, openings, [], "the reference model")
            passes["reference_model"] = retrained.passes
        bar.say("weighing the evidence")
        evidence = Evidence(
            examples["forget"], texts["forget"], references, openings, tokenizer, now, before, retrained,
            holdout=examples.get("holdout", []), until=until, metrics=tuple(metrics), seed=seed,
        )  # fmt: skip
        found = evidence.audit()
    finally:
        bar.close()
    found.passes = passes
    found.settings = versions() | {
        "model": model_name(model), "original": model_name(original), "reference_model": model_name(reference_model), "metrics": list(metrics),
        "budget": budget, "target_exposure": until, "batch_size": batch_size, "truncate": truncate, "seed": seed,
    }  # fmt: skip
    found.seconds = time.perf_counter() - began
    return found


def _check(metrics: Sequence[str], until: float, batch_size: int, budget: int | None) -> None:
    for name in [metrics] if isinstance(metrics, str) else metrics:
        if name not in METRICS:
            raise ArgumentError(f"metrics has no {name!r}: {nearest(str(name), METRICS)}")
    if isinstance(metrics, str):
        raise ArgumentError(f"metrics must be a list of names, got the one string {metrics!r}")
    if not isinstance(until, (int, float)) or not 0 <= until < SIGNIFICANT:
        raise ArgumentError(
            f"until must be a number from 0 to below {SIGNIFICANT:.2f} bits, where a text counts as memorized, got {until!r}"
        )
    for name, value in (("batch_size", batch_size), ("budget", 1 if budget is None else budget)):
        if not isinstance(value, int) or value < 1:
            raise ArgumentError(f"{name} must be a whole number, 1 or more, got {value!r}")


def _questions(
    tokens: dict[str, list[Tokens]],
    references: list[Tokens],
    examples: list[Example],
    model: Any,
    tokenizer: Any,
    metrics: Sequence[str],
) -> dict[str, list[Tokens]]:
    """What each model is to read, by role."""
    texts = {"forget": tokens["forget"], "references": references}
    if "retain" in tokens:
        texts["retain"] = tokens["retain"]
    if "answer_prior" in metrics:
        known = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        start = next((i for i in known if i is not None), 0)
        if models.is_encoder_decoder(model):
            start = padding_id(tokenizer) if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        bare = [without_prompt(t, start) for t, e in zip(tokens["forget"], examples, strict=True) if e.prompt]
        if bare:
            texts["without prompt"] = bare
    return texts


@accepts(AuditConfig)
def audit(
    model: Any,
    forget: Any,
    *,
    retain: Any = None,
    holdout: Any = None,
    original: Any = None,
    reference_model: Any = None,
    tokenizer: Any = None,
    cache: str | Path | None = None,
    config: Any = None,
    progress: bool | None = None,
    **settings: Any,
) -> Audit:
    """Measure what a model remembers: model, forget, retain, holdout, original, reference_model, tokenizer, cache, config,
    progress.

    Args:
        {options}
    """
    given = dict(vars(AuditConfig.of(config, settings, "audit")))
    given["until"] = given.pop("target_exposure")
    return _audit(
        model,
        forget,
        retain=retain,
        holdout=holdout,
        original=original,
        reference_model=reference_model,
        tokenizer=tokenizer,
        cache=cache,
        progress=progress,
        **given,
    )
