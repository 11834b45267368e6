"""The blocks of code in pages of Markdown, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^ *```(\w*) *$")
_OPERATORS = frozenset({"&&", "||", "|", ";", "&"})
_REDIRECTIONS = frozenset({">", ">>", "<", "2>"})
_VARIABLE = re.compile(r"[A-Z_]+=")
SHELLS = frozenset({"bash", "sh", "shell", "console"})


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        page: Name of the file.
        line: Of its first line of code, from 1.
        language: As behind the fence; may be empty.
        lines: The code.
    """

    page: str
    line: int
    language: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Command:
    """One command of a block.

    Attributes:
        place: Page and line.
        words: As a shell hands them over, without variables, redirections and comments.
    """

    place: str
    words: tuple[str, ...]


def blocks_of(page: Path) -> Iterator[Block]:
    """Yield the blocks of code of a page."""
    language, begun, lines = "", 0, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = _FENCE.match(line)
        if begun and line.strip() == "```":
            yield Block(page.name, begun, language, tuple(lines))
            begun = 0
        elif begun:
            lines.append(line)
        elif fence:
            language, begun, lines = fence[1], number + 1, []
    assert not begun, f"{page.name}:{begun - 1}: the block does not end"


def commands_of(block: Block) -> Iterator[Command]:
    """Yield the commands of a block: all lines of a shell's; behind a prompt, `$ `, where output stands below it."""
    number = 0
    while number < len(block.lines):
        begun, line = number, block.lines[number]
        while line.endswith("\\") and number + 1 < len(block.lines):
            number += 1
            line = f"{line[:-1]} {block.lines[number]}"
        number += 1
        if line.startswith("$ "):
            line = line[2:]
        elif block.language not in SHELLS:
            continue
        for words in _commands_in(line):
            yield Command(f"{block.page}:{block.line + begun}", tuple(words))


def _commands_in(line: str) -> Iterator[list[str]]:
    """Cut a line of a shell at its operators."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split, lexer.commenters = True, ""
    words: list[str] = []
    is_target = False
    for word in lexer:
        if word.startswith("#"):
            break
        if word in _OPERATORS:
            yield from [words] if words else []
            words = []
        elif is_target or word in _REDIRECTIONS:
            is_target = word in _REDIRECTIONS
        elif words or not _VARIABLE.match(word):
            words.append(word)
    if words:
        yield words
