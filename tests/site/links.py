"""What the pages of a built site have and point to, and what a file of Markdown points to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

_FENCED = re.compile(r"^( *)```.*?^\1```", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`[^`\n]+`")
_LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")
_LOADED = {"img": "src", "script": "src", "link": "href", "iframe": "src"}
"""Tag -> what a browser fetches by itself for it."""


@dataclass
class Page:
    """What a page of HTML has.

    Attributes:
        ids: Places in it that a link may name.
        links: Where its links lead.
        loaded: What a browser fetches for it.
        unnamed: Pictures without words for those who do not see them.
    """

    ids: set[str] = field(default_factory=set)
    links: set[str] = field(default_factory=set)
    loaded: set[str] = field(default_factory=set)
    unnamed: list[str] = field(default_factory=list)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.page = Page()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = {name: value or "" for name, value in attrs}
        self.page.ids |= {told[name] for name in ("id", "name") if name in told}
        if tag == "a" and "href" in told:
            self.page.links.add(told["href"])
        if tag in _LOADED and _LOADED[tag] in told and told.get("rel") != "canonical":
            self.page.loaded.add(told[_LOADED[tag]])
        if tag == "img" and not told.get("alt"):
            self.page.unnamed.append(told.get("src", ""))


def pages_in(folder: Path) -> dict[Path, Page]:
    """Read all pages of a built site, but for that of addresses that do not exist, which has no place of its own."""
    found = {}
    for path in sorted(folder.rglob("*.html")):
        if path.name == "404.html":
            continue
        reader = _Reader()
        reader.feed(path.read_text(encoding="utf-8"))
        found[path] = reader.page
    return found


def dead_links(pages: dict[Path, Page]) -> list[str]:
    """Name the links, files and pictures that lead nowhere within a site; addresses elsewhere are not followed."""
    return [
        f"{path.name}: {link}"
        for path, page in pages.items()
        for link in sorted(page.links | page.loaded)
        if not urlsplit(link).scheme and not _leads_somewhere(path, link, pages)
    ]


def _leads_somewhere(path: Path, link: str, pages: dict[Path, Page]) -> bool:
    parts = urlsplit(link)
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if target.is_dir():
        target /= "index.html"
    if not target.is_file():
        return False
    return not parts.fragment or target not in pages or unquote(parts.fragment) in pages[target].ids


def markdown_links(path: Path) -> Iterator[str]:
    """Yield where the links of a file of Markdown lead, those in blocks of code left out."""
    yield from _LINK.findall(_CODE.sub("", _FENCED.sub("", path.read_text(encoding="utf-8"))))
