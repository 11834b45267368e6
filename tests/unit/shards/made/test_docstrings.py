"""Docstrings become queries a person could type and documents that answer them, split so that nothing leaks."""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections import defaultdict
from pathlib import Path

import pytest

from shards.errors import DataError
from shards.formats import open_dataset
from shards.made.docstring_text import MAX_BODY_CHARACTERS, is_useful, split_docstring
from shards.made.docstrings import build_docstring_dataset, read_package

BODY = "It takes one step after another until all of the work is done and nothing is left over at the end."


def write_package(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")


def function(name: str, summary: str, body: str = BODY, indent: str = "") -> str:
    lines = [f"def {name}():", f'    """{summary}', "", f"    {body}", '    """', ""]
    return "".join(f"{indent}{line}\n" for line in lines)


NUMBERS = "one two three four five six seven eight nine ten eleven twelve".split()  # noqa: SIM905


def modules(package: str, count: int, functions: int = 2) -> dict[str, str]:
    files = {f"{package}/__init__.py": ""}
    for number in range(count):
        files[f"{package}/part{number}.py"] = "".join(
            function(
                f"work{which}",
                f"Computes the {package} of {NUMBERS[which]} parts in place {number}",
                f"{BODY} {package} {number} {which}",
            )
            for which in range(functions)
        )
    return files


# --- from a docstring to query and document --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("docstring", "summary", "body"),
    [
        ("Splits a list into parts.\n\nParts are equal.", "Splits a list into parts", "Parts are equal."),
        ("Splits a list. Parts are equal.\nMostly.", "Splits a list", "Parts are equal. Mostly."),
        ("Splits, e.g. A lists, i.e. Sequences. Good.", "Splits, e.g. A lists, i.e. Sequences", "Good."),
        ("\n    Splits a list\n    into parts.\n\n      Deep.\n", "Splits a list into parts", "Deep."),
        ("split(a, b=1) -> list\n\nSplits a list.\n\nMore.", "Splits a list", "More."),
        ("This function splits a list.\n\nMore.", "Splits a list", "More."),
        ("This class is a list of parts.\n\nMore.", "A list of parts", "More."),
        (
            "Calls :func:`~torch.nn.relu` on ``x`` and `y`, see :ref:`the docs <target>`.\n\n**Bold** [link](http://x.y).",
            "Calls relu on x and y, see the docs",
            "Bold link.",
        ),
        (
            "Adds numbers.\n\nParameters\n----------\na : int\n    The first.\n\nExamples\n--------\n>>> add(1)\n2\n",
            "Adds numbers",
            "Parameters a : int The first.",
        ),
        ("Adds numbers.\n\n{a}\n\nExample::\n\n    >>> add()\n    3\n\nDone.", "Adds numbers", "Done."),
        ("Adds.\n\n.. math::\n    a + b\n\n.. note:: Slow.\n\n:param int a: First.", "Adds", "note: Slow. a: First."),
        ("Adds.\n\n```python\nadd(1)\n```\nAfter.\n\n:returns: a sum\n:rtype: int", "Adds", "After. Returns: a sum"),
    ],
)
def test_the_summary_becomes_the_query_and_the_rest_the_document(docstring: str, summary: str, body: str) -> None:
    assert split_docstring(inspect.cleandoc(docstring)) == (summary, body)


@pytest.mark.parametrize(
    "docstring", ["", "   \n", "Args:\n    x: A number.", ":param x: A number", ">>> f(1)\n2", "f(x)"]
)
def test_a_docstring_without_a_summary_gives_nothing(docstring: str) -> None:
    assert split_docstring(inspect.cleandoc(docstring)) == ("", "")


def test_an_absurdly_long_document_is_cut_between_words() -> None:
    parts = split_docstring("Adds.\n\n" + "word " * 5000)
    assert MAX_BODY_CHARACTERS - 5 <= len(parts[1]) <= MAX_BODY_CHARACTERS
    assert set(parts[1].split()) == {"word"}


@pytest.mark.parametrize(
    ("summary", "name"),
    [
        ("Splits the tensor into chunks", "torch.functional.split"),
        ("Return evenly spaced numbers over a specified interval", "numpy.linspace"),
    ],
)
def test_a_summary_that_a_person_would_type_is_taken(summary: str, name: str) -> None:
    assert is_useful(summary, BODY, name)
    assert not is_useful(summary, "Eleven words are too few for a document that answers.", name)


@pytest.mark.parametrize(
    "summary",
    [
        "Splits the tensor",  # three words
        " ".join(["Splits the tensor"] * 10),
        "Deprecated since the release before the last",
        "See the documentation of the other function",
        "Test that tensors are split into chunks",
        "Sets x=1 and returns the chunks",
        "Splits the {tensor} into some chunks",
        "Read the page at https://example.org about chunks",
        "3 chunks are made of the tensor",
        "Splits the tensor into chunks, e.g",
        "Splits the values of a class instance",  # the name says it all
        "Teilt den Tensor in gleich große Stücke",
    ],
)
def test_a_summary_that_nobody_would_type_is_left_out(summary: str) -> None:
    assert not is_useful(summary, BODY, "package.Tensor.split")


# --- from packages to names ------------------------------------------------------------------------------------------


def test_what_is_defined_without_an_underscore_is_read_near_the_top_first(tmp_path: Path) -> None:
    document = '"""D."""'
    write_package(
        tmp_path,
        {
            "pkg/__init__.py": f"{document}\nfrom ._core import add",
            "pkg/public.py": f"def shown():\n    {document}\ndef _hidden():\n    {document}\n"
            f"class Thing:\n    {document}\n    def method(self):\n        {document}\n"
            f"    def _no(self):\n        {document}\n"
            f"if True:\n    def guarded():\n        {document}\n        def inner():\n            {document}\n",
            "pkg/_solvers.py": f"{document}\ndef solve():\n    {document}",
            "pkg/deep/__init__.py": document,
            "pkg/_core/__init__.py": f"def add():\n    {document}",
            "pkg/tests/test_x.py": f"def helper():\n    {document}",
            "pkg/test_y.py": f"def helper():\n    {document}",
            "pkg/broken.py": "def (:",
        },
    )
    assert [(name, module) for name, module, _ in read_package(tmp_path, "pkg")] == [
        ("pkg", "pkg"),
        ("pkg._solvers.solve", "pkg._solvers"),
        ("pkg.public.shown", "pkg.public"),
        ("pkg.public.Thing", "pkg.public"),
        ("pkg.public.Thing.method", "pkg.public"),
        ("pkg.public.guarded", "pkg.public"),
        ("pkg.deep", "pkg.deep"),
    ]


def test_packages_that_are_private_or_tests_are_left_out(tmp_path: Path) -> None:
    site = tmp_path / "site"
    text = function("cut", "Cuts wood into many small {} pieces", BODY + " {}")
    names = ["single.py", "_private.py", "tests/__init__.py", "not-a-name.py", "empty/x.txt"]
    write_package(site, {name: text.replace("{}", name.strip("_").split(".")[0]) for name in names})
    write_package(site, modules("good", 30))
    counts = build_docstring_dataset(tmp_path / "data", site_packages=[site])
    packages = {document.id.split(".")[0] for document in open_dataset(tmp_path / "data").documents()}
    assert packages == {"good", "single"}
    assert counts["packages"] == 2


def test_sources_are_never_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    write_package(tmp_path / "site", {"evil/__init__.py": f"open({str(ran)!r}, 'w')\n"} | modules("alpha", 30))
    build_docstring_dataset(tmp_path / "data", site_packages=[tmp_path / "site"])
    assert not ran.exists()
    assert not {"evil", "alpha"} & set(sys.modules)


# --- the data set ----------------------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "site"
    write_package(folder, modules("alpha", 30) | modules("beta", 20) | modules("gamma", 2))
    return folder


def test_the_data_set_is_valid_and_each_query_finds_its_own_document(site: Path, tmp_path: Path) -> None:
    counts = build_docstring_dataset(tmp_path / "data", site_packages=[site])
    dataset = open_dataset(tmp_path / "data")
    assert not dataset.dropped
    assert counts == {
        "packages": 3,
        "documents": dataset.num_documents,
        **{f"{split} queries": len(qrels) for split, qrels in dataset.qrels.items()},
    }
    assert dataset.num_documents == 104 == len(dataset.queries)
    titles = {document.id: document for document in dataset.documents()}
    for qrels in dataset.qrels.values():
        for qid, grades in qrels.items():
            (docid,) = grades
            assert titles[docid].title == docid
            assert dataset.queries[qid].text not in titles[docid].text
            place = docid.split(".")[1].removeprefix("part")
            assert dataset.queries[qid].text.endswith(f"in place {place}")


def test_no_module_and_no_summary_is_in_two_splits(site: Path, tmp_path: Path) -> None:
    same = function(
        "again", "Computes the alpha of one parts in place 3!", "Other words are here, as many as are needed."
    )
    write_package(site, {"delta/__init__.py": same + function("also", "Cuts wood into many small pieces")})
    write_package(site, {"delta/b.py": function("body", "Finds another summary for the same text")})
    build_docstring_dataset(tmp_path / "data", site_packages=[site])
    dataset = open_dataset(tmp_path / "data")
    splits = defaultdict(set)
    for split, qrels in dataset.qrels.items():
        for grades in qrels.values():
            for docid in grades:
                splits[docid.rpartition(".")[0]].add(split)
    assert {split for module in splits.values() for split in module} == {"train", "dev", "test"}
    assert all(len(found) == 1 for found in splits.values())
    texts = [query.text.lower().strip("!.") for query in dataset.queries.values()]
    assert len(texts) == len(set(texts))
    ids = {document.id for document in dataset.documents()}
    assert "delta.again" not in ids  # the summary of another
    assert "delta.also" in ids
    assert "delta.b.body" not in ids  # the text of another


def test_the_same_packages_and_seed_give_the_same_bytes(site: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build_docstring_dataset(tmp_path / name, site_packages=[site], seed=seed)
    fingerprints = [open_dataset(tmp_path / name).fingerprint for name in "abc"]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_packages_share_the_limit_and_preferred_ones_get_more(site: Path, tmp_path: Path) -> None:
    def documents_of(**options: object) -> dict[str, int]:
        build_docstring_dataset(tmp_path / "data", site_packages=[site], **options)  # type: ignore[arg-type]
        found: dict[str, int] = defaultdict(int)
        for document in open_dataset(tmp_path / "data").documents():
            found[document.id.split(".")[0]] += 1
        return found

    assert documents_of(max_documents=60) == {"alpha": 28, "beta": 28, "gamma": 4}
    # Four turns of one and four documents give 4, 16 and 4, four more of alpha and beta the other 20.
    assert documents_of(max_documents=44, preferred=["beta"]) == {"alpha": 8, "beta": 32, "gamma": 4}


def test_too_few_docstrings_are_an_error(tmp_path: Path) -> None:
    write_package(tmp_path / "site", {"tiny/__init__.py": function("cut", "Cuts wood into many small pieces")})
    with pytest.raises(DataError, match="only 1 usable docstrings"):
        build_docstring_dataset(tmp_path / "data", site_packages=[tmp_path / "site"])
    assert not (tmp_path / "data").exists()
