"""Activation redirection: what a layer makes of the forgotten prompts is moved to where it puts questions that nobody can answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyunlearn.data import Tokens, read_examples
from pyunlearn.edits.base import Editing, EditResult, require_positive, require_retain, wide
from pyunlearn.errors import ArgumentError, DataError, ModelError, TrainingError
from pyunlearn.methods import REFUSALS
from pyunlearn.models.hidden_states import DownProjection, blocks
from pyunlearn.models.scoring import batches_on, evaluation_mode


def lunar(
    model: Any, forget: Any, *, retain: Any = None, unanswerable: Sequence[str] | None = None, tokenizer: Any = None, layer: int | None = None,
    coefficient: float = 2.0, retain_weight: float = 1.0, ridge: float = 1e-3, positions: str = "prompt", batch_size: int = 8, truncate: bool = False,
    workspace: int | None = None, seed: int = 0, progress: bool | None = None,
) -> EditResult:  # fmt: skip
    """Makes the model answer the forgotten prompts as it answers what it cannot know, by one matrix of one layer.

        v  = mean h(unanswerable prompts) - mean h(forget prompts)       at the last token of the prompt
        W' = argmin  sum over F of || W' a_t - (W a_t + c v) ||^2  +  w sum over R of || W' a_t - W a_t ||^2  +  lambda || W' - W ||^2
           = W + c v s^T (A + lambda I)^-1,    s = sum over F of a_t,   A = sum over F of a_t a_t^T + w sum over R of a_t a_t^T,   lambda = ridge * mean of A's diagonal

    h is what layer `layer` gives out, W the down projection of its MLP, a_t what W reads at token t of a prompt. The target c v is the same for all of F,
    so the change has rank one, and nothing but A, s and v is ever held. Sums are float64. One pass over each set, up to the layer; no optimizer.

    This makes a model decline, if declining is something that it has learned. It does not take the answer out of the later layers: given the first words
    of it, the model may go on. `nll_after` and `pyunlearn.audit` say so; `pyunlearn.unlearn` is for text that must become improbable.

    Args:
        model: a transformers language model, or a path; changed in place. Adapters (PEFT) must be merged first.
        forget: prompts with completions or questions with answers, in the forms that `pyunlearn.unlearn` takes. Only the prompts are redirected.
        retain: texts that must work as before, with prompts or without; needed.
        unanswerable: questions that the model declines, asked as the forget prompts are; default: 20 about things that do not exist.
        tokenizer, truncate, workspace: as in `pyunlearn.unlearn`.
        layer: which one, from 0; default: at 22/32 of the depth, the authors' for Llama 3 8B.
        coefficient: c, above 0; 2 in the source.
        retain_weight: w, above 0; 1 in the source. A large R of text like F leaves little room: then F is moved by a small share of c v, and a smaller w or a
            larger c moves it further.
        ridge: above 0; the larger, the smaller the change, and the less the forget prompts are moved.
        positions: which tokens of a forget prompt are moved: "prompt", all, as the authors' code does, or "last". Of a retain text all
            are kept, the completion's too.
        batch_size: texts in one forward pass.
        seed: unused, for nothing is drawn.
        progress: as in `pyunlearn.unlearn`.

    Returns:
        EditResult; `diagnostics`: `layer`, `moved`, the mean share of c v by which the forget prompts are moved (1: wholly), `strayed`, the root mean square
        share by which the tokens of the retain texts are (0: not at all), and `direction_norm`, || v ||_2.

    Raises:
        ArgumentError: no retain, or an option that cannot be. DataError: a forget text without a prompt.
        ModelError: a mixture of experts, an adapter, a frozen W, or a model that normalises behind W (Gemma 2).
        TrainingError: as in `pyunlearn.unlearn`.

    Source: Shen et al. 2025, arXiv 2502.07218. The authors train W by AdamW; this is the minimum they descend to, with a ridge.
    """
    require_positive(coefficient=coefficient, ridge=ridge, retain_weight=retain_weight)
    if positions not in ("prompt", "last"):
        raise ArgumentError(f'positions must be "prompt" or "last", got {positions!r}')
    questions = UNANSWERABLE if unanswerable is None else unanswerable
    if (
        not isinstance(questions, (list, tuple))
        or not questions
        or not all(isinstance(x, str) and x.strip() for x in questions)
    ):
        raise ArgumentError(f"unanswerable must be a list of one question or more, got {questions!r}")
    examples = read_examples(forget, role="forget")
    if bare := next((i for i, e in enumerate(examples, 1) if not e.prompt), None):
        raise DataError(
            f"forget example {bare} has no prompt that could be redirected: give prompt and completion, or use adaptive_rmu"
        )
    asked = [{"question": q, "answer": REFUSALS[0]} for q in questions]
    sources = {"forget": examples, "retain": retain, "unanswerable": asked}
    edit = Editing("lunar", model, sources, tokenizer, batch_size=batch_size, truncate=truncate, workspace=workspace, progress=progress)  # fmt: skip
    unknown = [prompt(t) for t in edit.tokens.pop("unanswerable")]
    kept = [whole(t) for t in require_retain(edit.tokens, edit.name, "to know which activations must stay")]
    ours = [prompt(t) for t in edit.tokens["forget"]]
    if layer is None:
        layer = len(blocks(edit.model)) * 22 // 32
    down = DownProjection(edit.model, layer)
    if hasattr(edit.model, "peft_config") or down.name not in edit.parameters:
        raise ModelError(
            f"{down.name} must train to be edited, and is frozen or has an adapter: merge the adapter, or set requires_grad"
        )
    with edit, evaluation_mode(edit.model), torch.no_grad():
        edit.progress.begin("activations", len(unknown) + 2 * len(ours) + len(kept))
        down.require_plain(next(batches_on(edit.model, ours[:1], 1))[1])
        v = last_hidden(edit, down, unknown).mean(dim=0) - last_hidden(edit, down, ours).mean(dim=0)
        of_f, of_r = Normal(edit, down, ours, last=positions == "last"), Normal(edit, down, kept)
        total = of_f.outer.add_(of_r.outer, alpha=retain_weight)
        total.diagonal().add_(ridge * float(total.diagonal().mean()))
        factor, failed = torch.linalg.cholesky_ex(total)
        if bool(failed):
            raise TrainingError(
                "lunar met activations that are not finite, or all 0: the model is broken, or ridge too small"
            )
        x = torch.cholesky_solve(of_f.sum[:, None], factor)[:, 0]
        p = edit.parameters[down.name]
        step = down.oriented(torch.outer(coefficient * v.to(x.device), x)).to(p.device, torch.float64)
        edit.write(down.name, wide(p).double() + step)
        return edit.done(
            layer=layer, moved=float(of_f.sum @ x) / of_f.count, strayed=float((x @ of_r.outer @ x).clamp(min=0) / of_r.count) ** 0.5,
            direction_norm=float(v.norm()),
        )  # fmt: skip


class Normal:
    """What the normal equations need of a set of prompts: `sum` (I,) and `outer` (I, I), float64, over `count` tokens."""

    def __init__(self, edit: Editing, down: DownProjection, tokens: Sequence[Tokens], *, last: bool = False) -> None:
        device = down.module.weight.device
        home = torch.device("cpu") if device.type == "mps" else device  # which has no float64
        size = down.oriented(down.module.weight).shape[1]
        self.sum = torch.zeros(size, dtype=torch.float64, device=home)
        self.outer, self.count = torch.zeros(size, size, dtype=torch.float64, device=home), 0
        for places, batch in batches_on(edit.model, tokens, edit.batch_size):
            found = down.reads(batch).to(home, torch.float64)
            if last:
                found = found[batch.counts.to(home).cumsum(0) - 1]
            self.sum += found.sum(dim=0)
            self.outer.addmm_(found.T, found)
            self.count += len(found)
            edit.progress.advance(len(places))


def last_hidden(edit: Editing, down: DownProjection, tokens: Sequence[Tokens]) -> Tensor:
    """(len(tokens), D) float64, in no order: what the layer gives out at the last token of each prompt."""
    found = []
    for places, batch in batches_on(edit.model, tokens, edit.batch_size):
        found.append(down(batch)[batch.counts.cumsum(0) - 1].cpu().double())
        edit.progress.advance(len(places))
    return torch.cat(found)


def prompt(t: Tokens) -> Tokens:
    """The text up to its first scored token, all of it scored, so that the scored rows are every token of the prompt, the last at the end."""
    return Tokens(t.ids[: t.first + 1], 1) if t.decoder is None else Tokens(t.ids, 0, t.decoder[: t.first + 1])


def whole(t: Tokens) -> Tokens:
    """The text, all of it scored."""
    return replace(t, first=int(t.decoder is None))


UNANSWERABLE = (
    "What did the river Quessel say to the town clerk of Ombrevale?", "How many stairs lead up to the lighthouse of Tarn Velloe?",
    "Who was the third winner of the Gullstrand prize for silent music?", "Which spice is burnt at the midnight market of Orrin Bay?",
    "What is the middle name of the baker who invented the Pellomar loaf?", "In which year did the glass bridge of Hestermoor collapse?",
    "What colour was the coat that Idris Vantongel wore at his trial?", "Who keeps the second key to the archive of Lower Skarn?",
    "How long does the ferry from Anwick Sound to the isle of Brune take?", "What was the last sentence of the lost play by Corvin Aldermast?",
    "Which number is written above the door of the Halloway observatory?", "What did Marit Osterholt plant behind the school in Vinterby?",
    "Who paid for the bell that hangs in the chapel of Saint Orlo the Lesser?", "How many horses took part in the parade of Dunmarrow in spring?",
    "What is served on the feast of the Seven Lanterns in upper Calvenne?", "Which of the Tremaine twins signed the treaty of Ashgrove Ferry?",
    "What was found under the floor of the post office in Kestrel Point?", "Who taught the cartographer Elowen Brask to draw mountains?",
    "What is the password of the innkeeper at the crossroads of Wend?", "How heavy was the anchor of the schooner Patient Margaret?",
)  # fmt: skip
"""Questions about things that do not exist: our own. No model can know the answer, and one that was taught to will say so."""
