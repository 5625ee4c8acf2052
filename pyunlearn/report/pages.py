"""HTML pages from templates: one look for all of them, and nothing is fetched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_SHARED = Path(__file__).parent / "templates"


def rendered(template: Path, content: Mapping[str, Any], **filters: Callable[..., str]) -> str:
    """The template with its content, as text. It may include what stands beside it or among this package's templates, such as page.css."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([template.parent, _SHARED]), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )  # fmt: skip
    environment.filters.update(filters)
    return environment.get_template(template.name).render(content)
