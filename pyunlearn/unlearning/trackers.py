"""The numbers of each step while a run is under way: for a function of the user, and for experiment trackers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyunlearn.errors import ArgumentError, DependencyError, OutputError, first_line
from pyunlearn.progress import logger
from pyunlearn.unlearning.config import UnlearnConfig

Listener = Callable[[dict[str, Any]], Any]
"""A function that gets a copy of a step's record, see `Result.history`."""

_PROJECT = "pyunlearn"


def require_listeners(on_step: Any, trackers: Sequence[str] | None) -> None:
    """Raise ArgumentError unless `on_step` can be called; DependencyError for a tracker that is not installed."""
    if on_step is not None and not callable(on_step):
        raise ArgumentError(f"on_step must be a function of one step's record, a dict, got {type(on_step).__name__}")
    if trackers:
        from accelerate.tracking import get_available_trackers

        available = {str(name) for name in get_available_trackers()}
        for name in trackers:
            if name not in available:
                raise DependencyError(f"the tracker {name} is not installed: pip install {name.replace('_', '-')}")


@contextmanager
def listening(on_step: Listener | None, config: UnlearnConfig, output_dir: Path | None) -> Iterator[Listener | None]:
    """Yield what is called with the record of each step: `on_step`, and the trackers that the settings name.

    TensorBoard and Aim write to OUTPUT_DIR.logs, or to pyunlearn.logs without an output folder; the others have places
    of their own. A tracker that fails during the run is left out, with a warning.

    Raises OutputError where a tracker cannot be started.
    """
    if not config.log_with:
        yield on_step
        return
    place = Path(f"{_PROJECT}.logs") if output_dir is None else output_dir.with_name(f"{output_dir.name}.logs")
    settings = {k: v for k, v in config.to_dict().items() if _is_plain(v)}
    trackers: dict[str, Any] = {}

    def each(call: Callable[[Any], Any]) -> None:
        for name, tracker in list(trackers.items()):
            try:
                call(tracker)
            except Exception as error:  # of its network, for instance: no reason to lose a run
                del trackers[name]
                logger.warning(f"the tracker {name} failed and is left out from here on: {first_line(error)}")

    def log(record: dict[str, Any]) -> None:
        each(lambda tracker: tracker.log(numbers(record), step=record["step"]))
        if on_step is not None:
            on_step(record)

    try:
        for name in config.log_with:
            trackers[name] = _started(name, place, settings)
        yield log
    finally:
        each(lambda tracker: tracker.finish())


def _started(name: str, place: Path, settings: dict[str, Any]) -> Any:
    """Return a tracker of accelerate that has the settings; it logs in the main process alone."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind: Any = LOGGER_TYPE_TO_CLASS[name]
    try:
        tracker = kind(_PROJECT, str(place)) if kind.requires_logging_directory else kind(_PROJECT)
        if hasattr(tracker, "start"):  # newer versions of accelerate
            tracker.start()
        tracker.store_init_configuration(settings)
    except Exception as error:  # each package has its own
        raise OutputError(f"the tracker {name} could not be started: {first_line(error)}") from error
    return tracker


def _is_plain(value: Any) -> bool:
    """Return whether a setting can be sent on: a number, a flag or a word that is no path."""
    return isinstance(value, (bool, int, float)) or (isinstance(value, str) and not set("/\\") & set(value))


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a step's record: of its lists of examples the size, of a list of measurements the mean.

    >>> numbers({"step": 3, "examples": [4, 7], "forget_loss": -2.5, "retain_nll": None, "exposure": [1.0, 3.0]})
    {'examples': 2, 'forget_loss': -2.5, 'exposure': 2.0}
    """
    values: dict[str, float] = {}
    for name, value in record.items():
        if name in ("examples", "restored", "scored"):
            values[name] = len(value)
        elif isinstance(value, list):
            there = [x for x in value if x is not None]
            values |= {name: sum(there) / len(there)} if there else {}
        elif isinstance(value, (bool, int, float)) and name != "step":
            values[name] = int(value) if isinstance(value, bool) else value
    return values
