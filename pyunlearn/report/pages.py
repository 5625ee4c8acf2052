"""HTML pages from templates that share one style; a page loads nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pyunlearn.errors import printable

_SHARED = Path(__file__).parent / "templates"


def rendered(template: Path, content: Mapping[str, Any], **filters: Callable[..., str]) -> str:
    """Return the template filled with its content, as text.

    It may include files of its own folder and of this package's templates, such as page.css. Control characters are
    escaped.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([template.parent, _SHARED]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    page = environment.get_template(template.name).render(content)
    return "\n".join(map(printable, page.split("\n")))
