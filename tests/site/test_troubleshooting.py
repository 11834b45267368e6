"""The messages that docs/troubleshooting.md quotes are messages that the source still has."""

from __future__ import annotations

import ast
import itertools
import re

from tests.architecture.modules import ROOT, Module, docstrings_of, modules_of_the_project

PAGE = ROOT / "docs" / "troubleshooting.md"
OF_LIBRARIES = {"torch.OutOfMemoryError: CUDA out of memory"}
_HOLE = "\0"
_QUOTE = re.compile(r"`(?!`)([^`]+)`")


def quotes(text: str) -> list[str]:
    """Return the messages of a page: the code in the terms of its definition lists."""
    lines = text.splitlines()
    terms = [line for line, after in itertools.pairwise(lines) if after.startswith(":   ")]
    return [quote for term in terms for quote in _QUOTE.findall(term)]


def texts_of(module: Module) -> set[str]:
    """Return the texts of a module but for docstrings, with a sign for each value that is put into one."""
    found = set()
    told = docstrings_of(module)
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in told:
            found.add(node.value)
        elif isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else _HOLE for part in node.values)
            found.add("".join(str(part) for part in parts))
    return found


def pattern(quote: str) -> re.Pattern[str]:
    """Return what a quoted message looks like in the source: `...` stands for what is put in."""
    return re.compile(".*".join(re.escape(part) for part in quote.split("...")), re.DOTALL)


def test_quoted_messages_are_in_the_source() -> None:
    texts = {text for module in modules_of_the_project() for text in texts_of(module)}
    quoted = quotes(PAGE.read_text(encoding="utf-8"))
    assert len(quoted) > 30
    assert len(set(quoted)) == len(quoted)
    assert set(quoted) >= OF_LIBRARIES
    lost = [one for one in quoted if one not in OF_LIBRARIES and not any(pattern(one).search(text) for text in texts)]
    assert not lost, f"no message of the source is like {lost}: correct {PAGE.name}"


def test_a_message_that_has_changed_is_seen() -> None:
    module = Module("a", '"""of another:"""\nf"the folder {path} is " f"not empty and holds {what}"')
    text = max(texts_of(module), key=len)
    assert pattern("the folder ... is not empty and holds ...").search(text)
    assert not pattern("the folder ... is not empty or holds ...").search(text)
    assert "of another:" not in texts_of(module)
    page = "`the folder ... is not empty` and `b`\n:   Because of `c`.\n\n`d` alone\n"
    assert quotes(page) == ["the folder ... is not empty", "b"]
