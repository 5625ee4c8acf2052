#!/usr/bin/env python3
"""Make the relative links of README.md absolute, for the page of a package index, which has no other files.

The release workflow runs it before it builds the sdist; the links lead to the files of the released version.
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def repository() -> str:
    """Return the address of the repository in [project.urls]."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.search(r'^Repository = "(.*)"$', text, re.MULTILINE)[1]


def version() -> str:
    """Return the version in pyunlearn/__init__.py."""
    text = (ROOT / "pyunlearn" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.*)"$', text, re.MULTILINE)[1]


def absolute(text: str, home: str, tag: str) -> str:
    """Return Markdown whose relative links are links to the files of a tag, and relative images the raw files.

    >>> absolute("[a](b.md#c), ![d](e.svg), [f](#g), [h](https://i.org)", "https://h/o/r", "v1")
    '[a](https://h/o/r/blob/v1/b.md#c), ![d](https://h/o/r/raw/v1/e.svg), [f](#g), [h](https://i.org)'
    """

    def link(match: re.Match[str]) -> str:
        return f"{match[1]}({home}/{'raw' if match[1].startswith('!') else 'blob'}/{tag}/{match[2]})"

    return re.sub(r"(!?\[[^\]]*\])\((?!https?:|#)([^)]+)\)", link, text)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(absolute(readme.read_text(encoding="utf-8"), repository(), f"v{version()}"), encoding="utf-8")
