"""Build entry point; the metadata is in pyproject.toml, but for the README, whose links are made absolute here."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)\s]+)\)")


def repository(metadata: str) -> str | None:
    """Return the URL that pyproject.toml gives as Repository, if it gives one."""
    found = re.search(r'^Repository = "(.+?)/?"$', metadata, re.MULTILINE)
    return found and found[1]


def description(readme: str, url: str | None) -> str:
    """Return the README for a package index, where relative links lead nowhere.

    With the URL of a repository they lead into it. Without one a link is left as its text, and a picture is left out.
    """

    def absolute(match: re.Match[str]) -> str:
        picture, text, path = match.groups()
        if url is None:
            return "" if picture else text
        return f"{picture}[{text}]({url}/{'raw' if picture else 'blob'}/HEAD/{path})"

    return LINK.sub(absolute, readme)


if __name__ == "__main__":
    readme, metadata = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "pyproject.toml"))
    setup(
        long_description=description(readme, repository(metadata)),
        long_description_content_type="text/markdown",
    )
