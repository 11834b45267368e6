"""`sparring options [WORD ...]`: the keys of recipes and of `key=value` words: what each takes, default, meaning."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence

from engine.config.recipes import RECIPES
from engine.config.reference import LEFT_OUT, NO_DEFAULT, Option, Use, options_of
from engine.errors import ConfigError
from launcher.terminal.arguments import typed_path
from shards.files import write_atomically

EXAMPLES = ("learning rate --recipe ar2", "ar2.top_k")
_MOST_COLUMNS, _PAGE_COLUMNS = 100, 116

_PAGE_NAMED = re.compile(r"`?\bdocs/(\w+\.md)`?")

_PAGE_HEAD = """\
# Options

Every key of a recipe, and of the `key=value` words behind a command (docs/configuration.md says how they are read).
This page is made of the docstrings in `engine/config/` by `sparring options --markdown FILE`;
`sparring options WORD ...` searches it.

Names that begin with two dots are the end of several keys, which stand below them. Where a section is one of several
kinds, its `name` stands in brackets: `filters[margin].share` is `share` of a filter with `name: margin`.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's words."""
    parser.add_argument("words", nargs="*", metavar="WORD", help="only options with all these words in key or text")
    parser.add_argument("--recipe", metavar="NAME", help="of one recipe, such as ar2 or r2anker; left out, of all")
    parser.add_argument("--markdown", type=typed_path, metavar="FILE", help="write them as a page of Markdown")


def run_command(arguments: argparse.Namespace) -> int:
    """Print the options, or write the page; return 0.

    Raises:
        ConfigError: There is no such recipe, or no option has the words.
    """
    if arguments.recipe is not None and arguments.recipe not in RECIPES:
        raise ConfigError(f"there is no recipe {arguments.recipe!r}", expected=f"one of {', '.join(RECIPES)}")
    recipes = {name: one for name, one in RECIPES.items() if arguments.recipe in {None, name}}
    found = [one for one in options_of(recipes) if one.has(arguments.words)]
    if not found:
        of_all = [use.key for one in options_of(recipes) for use in one.uses]
        raise _nothing_found(arguments.words, of_all)
    if arguments.markdown is not None:
        with write_atomically(arguments.markdown) as temporary:
            temporary.write_text(page(found, list(recipes)), encoding="utf-8")
        return 0
    columns = min(_MOST_COLUMNS, shutil.get_terminal_size((_MOST_COLUMNS, 0)).columns)
    bold = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print("\n\n".join("\n".join(_lines(one, list(recipes), columns, bold=bold)) for one in found))
    return 0


def page(options: Sequence[Option], recipes: Sequence[str]) -> str:
    """Return the options as a page of Markdown, by sections.

    Args:
        options: In their order.
        recipes: Names of all recipes that were asked for.
    """
    sections: dict[str, list[Option]] = {}
    for one in options:
        tops = {use.key.split(".")[0].split("[")[0] for use in one.uses}
        alone = len(tops) == 1 and "." in one.uses[0].key
        sections.setdefault(tops.pop() if alone else _of_the_file(one), []).append(one)
    lines = [_PAGE_HEAD]
    for name, members in sorted(sections.items(), key=lambda section: section[0].startswith("In ")):
        lines.append(f"## {name}\n")
        lines += [_paragraph(one, recipes) for one in members]
    return _PAGE_NAMED.sub(r"[\1](\1)", "\n".join(lines))


def _of_the_file(option: Option) -> str:
    return "In several sections" if len(option.uses) > 1 and "." in option.uses[0].key else "In the file itself"


def _paragraph(option: Option, recipes: Sequence[str]) -> str:
    """Return an item of the page's list."""
    only = option.uses[0]
    if len(option.uses) == 1:
        head = f"**`{option.name}`**: {option.takes}; {_default(only.default, ticks=True)}{_of(only, recipes)}."
        return _wrapped(f"- {head} {option.text}", "  ", _PAGE_COLUMNS) + "\n"
    places = "; ".join(
        f"{', '.join(f'`{key}`' for key in keys)}: {_default(default, ticks=True)}{of}"
        for (default, of), keys in _places(option, recipes).items()
    )
    lines = [_wrapped(f"- **`{option.name}`**: {option.takes}. {option.text}", "  ", _PAGE_COLUMNS)]
    return "\n".join([*lines, _wrapped(f"    - {places}.", "      ", _PAGE_COLUMNS)]) + "\n"


def _lines(option: Option, recipes: Sequence[str], columns: int, *, bold: bool) -> Iterator[str]:
    """Return an option as lines for a terminal."""
    start, end = ("\x1b[1m", "\x1b[0m") if bold else ("", "")
    yield f"{start}{option.name}{end}"
    only = option.uses[0]
    default = f"; {_default(only.default)}{_of(only, recipes)}" if len(option.uses) == 1 else ""
    yield _wrapped(f"    {option.takes.replace('`', '')}{default}", "    ", columns)
    yield _wrapped(f"    {option.text}", "    ", columns)
    if len(option.uses) > 1:
        for (default, of), keys in _places(option, recipes).items():
            yield _wrapped(f"      {_default(default)}{of}: {', '.join(keys)}", "        ", columns)


def _places(option: Option, recipes: Sequence[str]) -> dict[tuple[str, str], list[str]]:
    """Return the keys of an option by their default, and by recipes where a key has several defaults."""
    places: dict[tuple[str, str], list[str]] = {}
    for use in option.uses:
        several = [other.key for other in option.uses].count(use.key) > 1
        places.setdefault((use.default, _of(use, recipes) if several else ""), []).append(use.key)
    return places


def _default(text: str, *, ticks: bool = False) -> str:
    if text == NO_DEFAULT:
        return text
    if text == LEFT_OUT:
        return "default: left out"
    return f"default `{text}`" if ticks else f"default {text}"


def _of(use: Use, recipes: Sequence[str]) -> str:
    """Say which recipes have a key, where not all have it."""
    return "" if len(use.recipes) == len(recipes) else f" ({', '.join(use.recipes)})"


def _wrapped(text: str, indent: str, columns: int) -> str:
    return textwrap.fill(text, columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _nothing_found(words: Sequence[str], keys: Sequence[str]) -> ConfigError:
    near = difflib.get_close_matches(" ".join(words), keys, n=3, cutoff=0.5)
    for word in words:
        leaves = difflib.get_close_matches(word, {key.split(".")[-1] for key in keys}, n=2, cutoff=0.6)
        near += [key for key in keys if key.split(".")[-1] in leaves]
    hint = f"near are {', '.join([*dict.fromkeys(near)][:4])}" if near else "search for fewer or other words"
    return ConfigError(f"no option has {' and '.join(map(repr, words))} in its key or text", remedy=hint)
