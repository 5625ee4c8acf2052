"""Unlearning runs: plain ascent on one forget set, with everything that is measured on the way."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyunlearn.data import TokenBatch, collate, padding_id
from pyunlearn.methods import METHODS, Method
from pyunlearn.models import Likelihood, decoder_start_id, is_encoder_decoder
from pyunlearn.study.folder import Folder
from pyunlearn.study.models import load_model
from pyunlearn.study.old_config import Config
from pyunlearn.study.reference_models import score, translate
from pyunlearn.study.sets import ForgetSet, Sets

_DESTROYED = 5.0  # nats by which the test NLL may rise before a run ends


class Job(NamedTuple):
    """One unlearning run."""

    which: ForgetSet
    rate: float

    @property
    def file(self) -> str:
        """Where its trajectory lies."""
        return f"runs/{self.which}-lr{self.rate:g}.npz"


def jobs(config: Config, sets: Sets) -> list[Job]:
    """Every forget set at every learning rate; those of one rate and model together."""
    return [Job(which, rate) for rate in config.unlearning_rates for which in sets.forget]


def run_all(
    folder: Folder, config: Config, tokenizer: Any, sets: Sets, device: str, say: Callable[[str], None]
) -> None:
    """Makes every trajectory that is not there yet: an array for each measure, a row for each measurement.

        steps (T,); nll, accuracy (T, n) of the forget examples; reference_nll (T, m); test_nll (T,); bleu (T,), NaN where not taken;
        moved (T,) Euclidean distance of the weights from where they began

    Plain ascent: minibatches of the set in an order drawn from the seed, AdamW without weight decay or clipping, no retain term, dropout off. A
    run ends after `steps`, or before where a number is not finite or the test NLL has risen by 5 nats.
    """
    model, loaded = None, None
    todo = [job for job in jobs(config, sets) if not folder.has(job.file)]
    for number, job in enumerate(todo, 1):
        name = f"main-{job.which.draw}"
        if loaded != name:
            model, loaded = load_model(folder.path / "models" / name, device), name
            begin = {k: v.clone() for k, v in model.state_dict().items()}
        assert model is not None
        model.load_state_dict(begin)
        say(f"run {number} of {len(todo)}: {job.which}, rate {job.rate:g}")
        folder.arrays(job.file, **_ascend(model, config, tokenizer, sets, job))


def _ascend(model: Any, config: Config, tokenizer: Any, sets: Sets, job: Job) -> dict[str, Any]:
    places = sets.forget[job.which]
    forget, references = ([sets.tokens[i] for i in group] for group in (places, sets.references[job.which.kind]))
    test = [sets.tokens[i] for i in sets.test]
    likelihood, device = Likelihood(model), next(model.parameters()).device
    start = decoder_start_id(model) if is_encoder_decoder(model) else None
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.rate, weight_decay=0.0)
    rng = np.random.default_rng((config.seed, job.which.draw, job.which.repetitions))
    found: dict[str, list[Any]] = {
        k: [] for k in ("steps", "nll", "accuracy", "reference_nll", "test_nll", "bleu", "moved")
    }
    n, m, order = len(forget), len(references), np.array([], dtype=np.int64)

    def batch(chosen: Any) -> TokenBatch:
        return collate([forget[i] for i in chosen], pad_id=padding_id(tokenizer), decoder_start_id=start).to(device)

    original = [_begun(likelihood, batch([i]), METHODS[config.method]) for i in range(n)]
    for step in range(config.steps + 1):
        if step % config.every == 0 or step == config.steps:
            nll, accuracy = score(likelihood, [*forget, *references, *test], tokenizer)
            if not np.isfinite(nll).all():
                break
            utility = float(nll[n + m :].mean())
            last = (
                step == config.steps
                or utility > (utility if not found["test_nll"] else found["test_nll"][0]) + _DESTROYED
            )
            measured = len(found["steps"])
            wanted = measured % config.bleu_every == 0 or last
            moved = math.sqrt(
                sum(float((p.detach() - q).square().sum()) for p, q in zip(model.parameters(), before, strict=True))
            )
            point = (
                step,
                nll[:n],
                accuracy[:n],
                nll[n : n + m],
                utility,
                translate(model, tokenizer, sets, config) if wanted else math.nan,
                moved,
            )
            for values, value in zip(found.values(), point, strict=True):
                values.append(value)
            if last:
                break
        if len(order) < min(config.unlearning_batch, n):
            order = rng.permutation(n)
        chosen, order = order[: config.unlearning_batch], order[config.unlearning_batch :]
        reference = torch.cat([original[i] for i in chosen.tolist()])
        _step(METHODS[config.method], likelihood, batch(chosen), reference, optimizer)
    return {name: np.array(values) for name, values in found.items()}


def _step(method: Method, likelihood: Likelihood, batch: TokenBatch, reference: Tensor, optimizer: Any) -> None:
    count = len(batch.counts)

    def loss(*given: Tensor) -> Tensor:
        return method.loss(*given) / count

    objective = likelihood.token_objective if method.token else likelihood.objective
    optimizer.zero_grad()
    objective(batch, loss, reference).loss.backward()
    optimizer.step()


@torch.no_grad()
def _begun(likelihood: Likelihood, one: TokenBatch, method: Method) -> Tensor:
    """What the method's reference is at an example: its log-likelihood under the model as it came, of each token or in sum; zeros if unused."""
    found = likelihood(one) if method.needs else torch.zeros(len(one.targets), device=one.ids.device)
    return found if method.token else found.sum().view(1)
