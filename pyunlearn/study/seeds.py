"""The work of one seed: train its model, score every forget example under it, unlearn each of its forget sets.

In setup twins nothing is trained: every seed unlearns its sets from the checkpoint, and the twin scores the examples.

Seeds need nothing from each other, so several processes can share them.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import torch

from pyunlearn.errors import ModelError
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.study.config import StudyConfig
from pyunlearn.study.environment import add_environment
from pyunlearn.study.folder import Folder
from pyunlearn.study.models import load_checkpoint, load_model
from pyunlearn.study.runs import jobs, mean_nll, unlearn_set
from pyunlearn.study.sets import Sets
from pyunlearn.study.training import train


@dataclass(frozen=True)
class Inputs:
    """Inputs that all seeds of a study share."""

    folder: Folder
    config: StudyConfig
    tokenizer: Any
    sets: Sets
    device: str


CHECKPOINT, TWIN = "checkpoint", "twin"
"""Names of the two models of setup twins."""


def model_name(config: StudyConfig, seed: int) -> str:
    """Return the name of a seed's model in the folder."""
    return f"seed-{seed}" if config.twin is None else CHECKPOINT


def scores_file(name: str) -> str:
    """Return the name of the file with a model's scores."""
    return f"scores/{name}.safetensors"


def run_seed(inputs: Inputs, seed: int, say: Callable[[str], None]) -> None:
    """Do what is not finished of one seed.

    Writes a trajectory for each run, see `unlearn_set`, and before that models/seed-S and its scores (in setup twins
    both exist already). The versions and hardware of each call that had work to do are in environment/seed-S.json.
    """
    folder, config, sets, name = inputs.folder, inputs.config, inputs.sets, model_name(inputs.config, seed)
    todo = [job for job in jobs(config, sets, seed) if not folder.has(job.file)]
    trained = config.twin is not None or folder.has(f"models/{name}")
    if todo or not (trained and folder.has(scores_file(name))):
        add_environment(folder, f"seed-{seed}", inputs.device)
    if config.twin is None:
        train(
            folder,
            name,
            config,
            inputs.tokenizer,
            sets.learned,
            sets.epochs(config, seed),
            seed=seed,
            device=inputs.device,
            say=say,
        )
    if not todo and folder.has(scores_file(name)):
        return
    lm = _load(inputs, name)
    _score(inputs, lm, name)
    original = {key: value.clone() for key, value in lm.module.state_dict().items()}
    for number, job in enumerate(todo, 1):
        say(f"seed {seed}: unlearning {number} of {len(todo)}, {job.which.kind}, dose {job.which.dose}, {job.rate:g}")
        lm.module.load_state_dict(original)
        folder.arrays(job.file, **unlearn_set(lm, config, sets, job))


def score_twins(inputs: Inputs, say: Callable[[str], None]) -> None:
    """Score every example under both models of setup twins, one after the other."""
    for name in (CHECKPOINT, TWIN):
        if not inputs.folder.has(scores_file(name)):
            say(f"reading with the {name}")
            add_environment(inputs.folder, name, inputs.device)
            _score(inputs, _load(inputs, name), name)


def _load(inputs: Inputs, name: str) -> LanguageModel:
    """Load a model of the study, without dropout."""
    if name in (CHECKPOINT, TWIN):
        lm = load_checkpoint(getattr(inputs.config, name), inputs.tokenizer, inputs.device)
        lm.module.eval()
        return lm
    return load_model(inputs.folder.path / "models" / name, inputs.tokenizer, inputs.device)


def _score(inputs: Inputs, lm: LanguageModel, name: str) -> None:
    """Write nll (N,) of all examples in the order of `Sets.scored`, and the mean test_nll, nats per token.

    Raises ModelError where a number is not finite.
    """
    folder, sets = inputs.folder, inputs.sets
    if folder.has(scores_file(name)):
        return
    nll, test_nll = (mean_nll(lm, [sets.tokens[i] for i in group]) for group in (sets.scored(), sets.test))
    if not (np.isfinite(nll).all() and np.isfinite(test_nll).all()):
        mend = "training broke it: choose a lower learning_rate" if inputs.config.twin is None else "give another pair"
        raise ModelError(f"the model {name} gives its texts NaN or Inf as log-likelihood; {mend}")
    folder.arrays(scores_file(name), nll=nll, test_nll=test_nll.mean())


def run_seeds(inputs: Inputs, say: Callable[[str], None]) -> None:
    """Run every seed, in this process or shared by `config.processes` new ones.

    Each new process has an equal share of this one's threads, and ends when this one does. Raises what a process
    raises; ModelError where one ended without a word, as for lack of memory.
    """
    seeds, count = list(range(inputs.config.seeds)), min(inputs.config.processes, inputs.config.seeds)
    if count == 1:
        for seed in seeds:
            run_seed(inputs, seed, say)
        return
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // count)
    workers: dict[Connection, Any] = {}
    try:
        for number in range(count):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(inputs, seeds[number::count], threads, theirs), daemon=True)
            process.start()
            theirs.close()
            workers[ours] = process
        while workers:
            for connection in wait(list(workers)):
                _receive(connection, workers, say)  # type: ignore[arg-type]
    finally:
        for process in workers.values():
            process.terminate()
            process.join()


def _receive(connection: Connection, workers: dict[Connection, Any], say: Callable[[str], None]) -> None:
    """Show a line of a process, or raise its error; forget the process when it has ended."""
    try:
        message = connection.recv()
    except EOFError:
        process = workers.pop(connection)
        process.join()
        if process.exitcode:
            raise ModelError(
                f"a process of the study ended with exit code {process.exitcode}, perhaps for lack of memory: run the "
                "same again with fewer processes, and it resumes"
            ) from None
        return
    if isinstance(message, BaseException):
        raise message
    say(message)


def _end_with_parent() -> None:
    """Wait until the process that started this one is gone, and end this one: files are renamed when they are whole."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _work(inputs: Inputs, seeds: list[int], threads: int, connection: Connection) -> None:
    """Run some seeds in a new process, which ends when the one that started it does."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        for seed in seeds:
            run_seed(inputs, seed, connection.send)
    except (KeyboardInterrupt, BrokenPipeError):
        pass  # the process that started this one has the signal too, or is gone
    except Exception as error:
        connection.send(error)
    finally:
        connection.close()
