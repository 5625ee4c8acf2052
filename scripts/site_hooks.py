"""Hooks of the documentation's site: the README is its first page, and links out of docs/ lead to the repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent

_LINK = re.compile(r"(\]\()(?!https?:|#)([^)#\s]+)([^)]*\))")


def on_files(files: Files, config: Any) -> Files:
    """Add README.md as the first page."""

    def inside(match: re.Match[str]) -> str:
        target = match[2].removeprefix("docs/")
        return match[1] + (target if target != match[2] else address(config, match[2])) + match[3]

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=_LINK.sub(inside, text)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Point links that lead out of docs/ to the repository."""
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def outside(match: re.Match[str]) -> str:
        target = (folder / match[2]).resolve()
        if not target.is_relative_to(ROOT) or target.is_relative_to(ROOT / "docs"):
            return match[0]
        return match[1] + address(config, target.relative_to(ROOT).as_posix()) + match[3]

    return markdown if page.file.src_uri == "index.md" else _LINK.sub(outside, markdown)


def address(config: Any, path: str) -> str:
    """Return the address of a file of the repository."""
    return f"{config.repo_url}/blob/main/{path}"
