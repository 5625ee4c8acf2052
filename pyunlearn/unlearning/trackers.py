"""The numbers of each step while a run is under way: for a function of the user, and for experiment trackers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyunlearn.errors import ArgumentError, DependencyError
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

    A tracker that writes files has them in OUTPUT_DIR.logs, or in pyunlearn.logs without an output folder.
    """
    if not config.log_with:
        yield on_step
        return
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    place = Path(f"{_PROJECT}.logs") if output_dir is None else output_dir.with_name(f"{output_dir.name}.logs")
    project = ProjectConfiguration(project_dir=str(place), logging_dir=str(place))
    accelerator = Accelerator(log_with=list(config.log_with), project_config=project)
    settings = {k: v for k, v in config.to_dict().items() if isinstance(v, (bool, int, float, str))}
    accelerator.init_trackers(_PROJECT, config=settings)

    def log(record: dict[str, Any]) -> None:
        accelerator.log(numbers(record), step=record["step"])
        if on_step is not None:
            on_step(record)

    try:
        yield log
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


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
