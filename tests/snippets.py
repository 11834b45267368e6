"""The code in a Markdown text, run as its reader would run it: each piece by itself, where its paths exist."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any


def snippets_of(text: str) -> list[str]:
    """Return the pieces of Python in a text, in their order."""
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def run_snippet(code: str, workplace: Path, links: dict[str, Path]) -> dict[str, Any]:
    """Run a piece of code and return its names.

    Args:
        code: As it stands in the text.
        workplace: The folder where it runs; made if needed.
        links: A relative path that the code names to what lies there.
    """
    for name, target in links.items():
        place = workplace / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        place.symlink_to(target, target_is_directory=True)
    names: dict[str, Any] = {"__name__": "a snippet"}
    before = Path.cwd()
    os.chdir(workplace)
    try:
        exec(compile(code, "snippet", "exec"), names)
    finally:
        os.chdir(before)
    return names
