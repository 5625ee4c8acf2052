"""Hooks of the documentation's site: the README is its first page, and links out of docs/ lead to the repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
REPOSITORY = "https://github.com/pyunlearn/pyunlearn/blob/main/"

_LINK = re.compile(r"(\]\()(?!https?:|#)([^)#\s]+)([^)]*\))")


def on_files(files: Files, config: Any) -> Files:
    """Add README.md as the first page."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=_LINK.sub(_from_root, text)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links that lead out of docs/ to the repository."""
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def outside(match: re.Match[str]) -> str:
        target = (folder / match[2]).resolve()
        if not target.is_relative_to(ROOT) or target.is_relative_to(ROOT / "docs"):
            return match[0]
        return f"{match[1]}{REPOSITORY}{target.relative_to(ROOT).as_posix()}{match[3]}"

    return markdown if page.file.src_uri == "index.md" else _LINK.sub(outside, markdown)


def _from_root(match: re.Match[str]) -> str:
    """Return a link of the README as one of docs/index.md."""
    inside = match[2].removeprefix("docs/")
    return f"{match[1]}{inside if inside != match[2] else REPOSITORY + match[2]}{match[3]}"
