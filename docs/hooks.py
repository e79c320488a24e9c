"""What happens to pages while MkDocs builds them."""

from __future__ import annotations

import re


def on_page_markdown(markdown: str, **_: object) -> str:
    """Drop the word by which a fence tells the tests that it is not run."""
    return re.sub(r"^(\s*```\w+) no-run\s*$", r"\1", markdown, flags=re.MULTILINE)
