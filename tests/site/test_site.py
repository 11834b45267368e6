"""The site of the documentation builds, and each of its links leads somewhere, as do those of README.md."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

import sparring
from tests.distributed.processes import ROOT
from tests.site.links import Page, dead_links, markdown_links, pages_in

DOCS = ROOT / "docs"
BESIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
_NAMED = re.compile(r"\bdocs/(\w+)\.md\b")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    """All pages, built as `make docs` builds them: what mkdocs warns of is an error."""
    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))
    return pages_in(folder)


def test_warnings_are_errors() -> None:
    config = load_config(str(ROOT / "mkdocs.yml"))
    assert config.strict
    assert Path(config.site_dir).relative_to(ROOT).parts[0] == "build", "which git ignores"


def test_each_link_leads_somewhere(site: dict[Path, Page]) -> None:
    assert {f"{page.stem}.html" for page in DOCS.glob("*.md")} <= {path.name for path in site}
    assert dead_links(site) == []


def test_a_page_asks_nobody_else(site: dict[Path, Page]) -> None:
    """Fonts and scripts of other hosts would make errors where there is no network, and tell who reads."""
    elsewhere = {link for page in site.values() for link in page.loaded if urlsplit(link).netloc}
    assert elsewhere == set()


def test_each_picture_has_words(site: dict[Path, Page]) -> None:
    assert [name for page in site.values() for name in page.unnamed] == []


@pytest.mark.parametrize("name", BESIDE)
def test_links_beside_the_site_lead_somewhere(name: str, site: dict[Path, Page]) -> None:
    ids = {path.stem: page.ids for path, page in site.items()}
    for link in markdown_links(ROOT / name):
        parts = urlsplit(link)
        if parts.scheme or not parts.path:
            continue
        target = ROOT / parts.path
        assert target.exists(), f"{name}: {link}"
        if parts.fragment:
            assert target.parent == DOCS, f"{name}: {link}"
            assert parts.fragment in ids[target.stem], f"{name}: {link}"


def test_pages_that_are_named_exist() -> None:
    """In words, messages and docstrings, where a page is no link."""
    folders = ("docs", "engine", "launcher", "shards", "sparring", "configs", "examples", "benchmarks")
    files = [
        path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in {".md", ".py", ".yaml"}
    ]
    named = {
        (page, path.relative_to(ROOT).as_posix())
        for path in [*files, *(ROOT / name for name in BESIDE)]
        for page in _NAMED.findall(path.read_text(encoding="utf-8"))
    }
    assert {page for page, _ in named} >= {"options", "cluster"}
    assert [f"{where}: docs/{page}.md" for page, where in sorted(named) if not (DOCS / f"{page}.md").exists()] == []


def test_dead_links_are_seen(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<a id="here"></a><a href="#here"><a href="#there"><a href="b.html"><a href="b.html#x"><a href="c.html">'
        '<a href="https://example.org/"><img src="no.svg"><img src="a.html" alt="words">'
    )
    (tmp_path / "b.html").write_text('<h2 id="y">')
    pages = pages_in(tmp_path)
    assert dead_links(pages) == ["a.html: #there", "a.html: b.html#x", "a.html: c.html", "a.html: no.svg"]
    assert pages[tmp_path / "a.html"].unnamed == ["no.svg"]
    (tmp_path / "a.md").write_text("[a](b.md#c)\n```\n[no](link.md)\n```\n`x[0](y)` and [d](e.md).\n")
    assert list(markdown_links(tmp_path / "a.md")) == ["b.md#c", "e.md"]


def test_the_page_of_the_api_has_all_that_is_public(site: dict[Path, Page]) -> None:
    (ids,) = (page.ids for path, page in site.items() if path.name == "api.html")
    shown = {name.rsplit(".", 1)[-1] for name in ids}
    assert set(sparring.__all__) - {"__version__"} - shown == set()


def test_each_recipe_is_explained() -> None:
    told = (DOCS / "recipes.md").read_text(encoding="utf-8")
    assert [path.stem for path in sorted((ROOT / "configs").glob("*.yaml")) if f"`{path.stem}`" not in told] == []
