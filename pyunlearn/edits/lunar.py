"""Activation redirection (LUNAR): make a layer's output for forget prompts that for unanswerable questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyunlearn.data import Example, Tokens, read_examples
from pyunlearn.edits.base import POSITIVE, Editing, EditResult, require_optional
from pyunlearn.edits.config import EditConfig
from pyunlearn.errors import ArgumentError, DataError, ModelError, TrainingError, brief
from pyunlearn.methods import REFUSALS
from pyunlearn.models.hidden_states import DownProjection, blocks
from pyunlearn.models.scoring import evaluation_mode
from pyunlearn.ops._portable import float64_device, to_float64
from pyunlearn.options import Choice, Text, Whole, accepts, require
from pyunlearn.probes.long_texts import encode_texts


@accepts(EditConfig)
def lunar(
    model: Any,
    forget: Any,
    *,
    retain: Any = None,
    unanswerable: Sequence[str] | Path | None = None,
    tokenizer: Any = None,
    layer: int | None = None,
    coefficient: float = 2.0,
    retain_weight: float = 1.0,
    ridge: float = 1e-3,
    positions: str = "prompt",
    progress: bool | None = None,
    config: EditConfig | str | Path | None = None,
    **settings: Any,
) -> EditResult:
    """Make the model answer the forgotten prompts like unanswerable questions, by one matrix of one layer.

        v  = mean h(unanswerable prompts) - mean h(forget prompts)       at the last token of the prompt
        W' = argmin  sum over F of || W' a_t - (W a_t + c v) ||^2
                     + w sum over R of || W' a_t - W a_t ||^2  +  lambda || W' - W ||^2
           = W + c v s^T (A + lambda I)^-1
        s  = sum over F of a_t,   A = sum over F of a_t a_t^T + w sum over R of a_t a_t^T

    h is the output of layer `layer`, W the down projection of its MLP, a_t the input of W at token t of a prompt, and
    lambda is ridge * mean of A's diagonal. The target c v is the same for all of F, so the change has rank one, and A,
    s and v are all that is stored. Sums are float64. One pass over each set, up to the layer; no optimizer. Nothing is
    random: `seed` has no effect.

    A model that has learned to decline declines. The answer is not removed from the later layers: given its first
    words, the model may continue with it. See `nll_after` and `pyunlearn.audit`; for text that must become improbable,
    use `pyunlearn.unlearn`.

    Args:
        model: a transformers language model, or a path; changed in place. Adapters (PEFT) must be merged first.
        forget: prompts with completions or questions with answers, in the forms that `pyunlearn.unlearn` takes. The
            prompts are redirected.
        retain: texts that must work as before, with prompts or without; required.
        unanswerable: questions that the model declines, in the style of the forget prompts, or the path of a file of
            them; default: 20 about things that do not exist.
        tokenizer: the model's; None: loaded from where the model came from.
        layer: its index, from 0; default: at 22/32 of the depth, the authors' choice for Llama 3 8B.
        coefficient: c, above 0; 2 in the source.
        retain_weight: w, above 0; 1 in the source. A large R of text like F leaves little room: F is then moved by a
            small share of c v, and a smaller w or a larger c moves it further.
        ridge: above 0; the larger, the smaller the change, and the less the forget prompts are moved.
        positions: tokens of a forget prompt that are moved: "prompt", all, as in the authors' code, or "last". All
            tokens of a retain text are preserved, the completion's too.
        progress: show a progress bar; None: on a terminal only.
        config: an EditConfig, or a file that holds one; the options below override it.
        {options}

    Returns:
        EditResult. `diagnostics`: `layer`, `moved`, the mean share of c v by which the forget prompts are moved (1: by
        all of it), `strayed`, the root mean square share by which the tokens of the retain texts are (0: not at all),
        and `direction_norm`, || v ||_2.

    Raises:
        ArgumentError: no retain, or an option out of range. DataError: a forget text without a prompt. ModelError: a
            mixture of experts, an adapter, a frozen W, or a model that normalises after W (Gemma 2). TrainingError: as
            in `pyunlearn.unlearn`.

    Source: Shen et al. 2025, arXiv 2502.07218. The authors train W by AdamW; this is the minimum of their loss, with a
    ridge.
    """
    config = EditConfig.of(config, settings, "lunar")
    require(POSITIVE, coefficient=coefficient, ridge=ridge, retain_weight=retain_weight)
    require(Choice(("prompt", "last")), positions=positions)
    require_optional(Whole(), layer=layer)
    sources = {
        "forget": _examples_with_prompts(forget),
        "retain": retain,
        "unanswerable": [{"question": q, "answer": REFUSALS[0]} for q in questions_of(unanswerable)],
    }
    needs = {"retain": "to know which activations must stay"}
    edit = Editing(
        "lunar", model, sources, tokenizer, config, progress=progress, needs=needs, unmeasured=["unanswerable"]
    )
    if layer is None:
        layer = len(blocks(edit.model)) * 22 // 32
    down = _down_projection(edit, layer)
    with edit, evaluation_mode(edit.model), torch.no_grad():
        unknown_prompts, forget_prompts = (prompts(edit, role) for role in ("unanswerable", "forget"))
        retain_texts = [whole(t) for t in edit.tokens["retain"]]
        edit.progress.begin("activations", len(unknown_prompts) + 2 * len(forget_prompts) + len(retain_texts))
        down.require_plain(next(edit.lm.batches(forget_prompts[:1], 1))[1])
        v = last_hidden(edit, down, unknown_prompts).mean(dim=0) - last_hidden(edit, down, forget_prompts).mean(dim=0)
        of_forget = normal_equations(edit, down, forget_prompts, last=positions == "last")
        of_retain = normal_equations(edit, down, retain_texts)
        x = _solve(of_forget, of_retain, retain_weight, ridge)  # (I,): (A + lambda I)^-1 s
        p = edit.parameters[down.name]
        before = to_float64(p.detach())
        step = down.oriented(torch.outer(coefficient * v.to(x.device), x)).to(before.device)
        edit.write(down.name, before + step)
        return edit.finish(
            layer=layer,
            moved=float(of_forget.sum @ x) / of_forget.tokens,
            strayed=float((x @ of_retain.outer @ x).clamp(min=0) / of_retain.tokens) ** 0.5,
            direction_norm=float(v.norm()),
        )


def questions_of(unanswerable: Any) -> list[str]:
    """Return the questions in a list or a file, or the default ones. Raises ArgumentError for anything else."""
    if unanswerable is None:
        return list(UNANSWERABLE)
    if isinstance(unanswerable, Path):
        examples = read_examples(unanswerable, role="unanswerable")
        return [e.messages[0].content if e.messages else e.completion for e in examples]
    question = Text()
    listed = isinstance(unanswerable, (list, tuple)) and unanswerable
    if not listed or not all(question.accepts(x) for x in unanswerable):
        raise ArgumentError(
            "unanswerable must be a list of one question or more, or the pathlib.Path of a file, "
            f"got {brief(unanswerable)}: leave it out for 20 questions about things that do not exist"
        )
    return list(unanswerable)


def _examples_with_prompts(forget: Any) -> list[Example]:
    """Read the forget texts. Raises DataError for one without a prompt."""
    examples = read_examples(forget, role="forget")
    if bare := next((i for i, e in enumerate(examples, 1) if not e.prompt), None):
        raise DataError(
            f"forget example {bare} has no prompt that could be redirected: "
            "give prompt and completion, or use adaptive_rmu"
        )
    return examples


def _down_projection(edit: Editing, layer: int) -> DownProjection:
    """Return the down projection of a layer. Raises ModelError where it is not trainable or has an adapter."""
    down = DownProjection(edit.model, layer)
    if hasattr(edit.model, "peft_config") or down.name not in edit.parameters:
        raise ModelError(
            f"{down.name} must be trainable to be edited, and is frozen or has an adapter: "
            "merge the adapter, or set requires_grad"
        )
    return down


class NormalEquations(NamedTuple):
    """Sums over the tokens of a set: `sum` (I,) of a_t, `outer` (I, I) of a_t a_t^T, and the number of `tokens`."""

    sum: Tensor
    outer: Tensor
    tokens: int


def normal_equations(
    edit: Editing, down: DownProjection, tokens: Sequence[Tokens], *, last: bool = False
) -> NormalEquations:
    """Sum over all scored tokens of the texts, or over the last token of each, in float64."""
    home = float64_device(edit.lm.device)
    size = down.oriented(down.module.weight).shape[1]
    total = torch.zeros(size, dtype=torch.float64, device=home)
    outer, count = torch.zeros(size, size, dtype=torch.float64, device=home), 0
    for indices, batch in edit.batches(tokens):
        inputs = to_float64(down.inputs(batch))  # (n, I)
        if last:
            inputs = inputs[batch.counts.to(home).cumsum(0) - 1]
        total += inputs.sum(dim=0)
        outer.addmm_(inputs.T, inputs)
        count += len(inputs)
        edit.progress.advance(len(indices))
    return NormalEquations(total, outer, count)


def _solve(of_forget: NormalEquations, of_retain: NormalEquations, retain_weight: float, ridge: float) -> Tensor:
    """Return (A + lambda I)^-1 s, (I,). Raises TrainingError where A is not positive. Overwrites of_forget.outer."""
    total = of_forget.outer.add_(of_retain.outer, alpha=retain_weight)
    total.diagonal().add_(ridge * float(total.diagonal().mean()))
    factor, failed = torch.linalg.cholesky_ex(total)
    if bool(failed):
        raise TrainingError(
            "lunar met activations that are not finite, or all 0: the model is broken, or ridge too small"
        )
    return torch.cholesky_solve(of_forget.sum[:, None], factor)[:, 0]


def last_hidden(edit: Editing, down: DownProjection, tokens: Sequence[Tokens]) -> Tensor:
    """Return (len(tokens), D) float64, in no order: the layer's output at the last token of each prompt."""
    hidden = []
    for indices, batch in edit.batches(tokens):
        hidden.append(down(batch)[batch.counts.cumsum(0) - 1].cpu().double())
        edit.progress.advance(len(indices))
    return torch.cat(hidden)


def prompts(edit: Editing, role: str) -> list[Tokens]:
    """Return the prompt of each record once, however long its answer is; of a chat all before its last turn."""
    answers = [replace(e, turns="last", spans=(), forget=()) for e in edit.texts.rendered[role]]
    template = edit.texts.rendering.chat_template
    encoded = encode_texts(edit.lm, {role: answers}, truncate=edit.config.truncate, chat_template=template)
    firsts = np.unique(encoded.records[role], return_index=True)[1]  # the first window of each record
    return [prompt(encoded.tokens[role][i]) for i in firsts]


def prompt(t: Tokens) -> Tokens:
    """Return the text up to its first scored token with every token scored: batch.rows are then the prompt's tokens.

    >>> prompt(Tokens((5, 6, 7, 8), 2))
    Tokens(ids=(5, 6, 7), first=1, decoder=None)
    """
    return Tokens(t.ids[: t.first + 1], 1) if t.decoder is None else Tokens(t.ids, 0, t.decoder[: t.first + 1])


def whole(t: Tokens) -> Tokens:
    """Return the text with every token scored.

    >>> whole(Tokens((5, 6, 7, 8), 2)).first
    1
    """
    return replace(t, first=int(t.decoder is None), chosen=None)


UNANSWERABLE = (
    "What did the river Quessel say to the town clerk of Ombrevale?",
    "How many stairs lead up to the lighthouse of Tarn Velloe?",
    "Who was the third winner of the Gullstrand prize for silent music?",
    "Which spice is burnt at the midnight market of Orrin Bay?",
    "What is the middle name of the baker who invented the Pellomar loaf?",
    "In which year did the glass bridge of Hestermoor collapse?",
    "What colour was the coat that Idris Vantongel wore at his trial?",
    "Who keeps the second key to the archive of Lower Skarn?",
    "How long does the ferry from Anwick Sound to the isle of Brune take?",
    "What was the last sentence of the lost play by Corvin Aldermast?",
    "Which number is written above the door of the Halloway observatory?",
    "What did Marit Osterholt plant behind the school in Vinterby?",
    "Who paid for the bell that hangs in the chapel of Saint Orlo the Lesser?",
    "How many horses took part in the parade of Dunmarrow in spring?",
    "What is served on the feast of the Seven Lanterns in upper Calvenne?",
    "Which of the Tremaine twins signed the treaty of Ashgrove Ferry?",
    "What was found under the floor of the post office in Kestrel Point?",
    "Who taught the cartographer Elowen Brask to draw mountains?",
    "What is the password of the innkeeper at the crossroads of Wend?",
    "How heavy was the anchor of the schooner Patient Margaret?",
)
"""Questions of our own about things that do not exist, which a model that was taught to decline will decline."""
