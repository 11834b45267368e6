"""Opening a data folder: whatever its layout, it comes out in one form, checked as a whole before work begins.

The corpus is streamed once for its check and is never held in memory: of each document only eight bytes stay (the hash
of its id), so that 21 million passages need 170 MB. A folder that `python -m launcher convert` made was checked when it
was written: its `dataset.json` stands for that pass.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from shards.errors import DataError, listed
from shards.files import sha256_file
from shards.formats import beir, canonical, dpr, msmarco
from shards.formats.blocks import find_blocks
from shards.formats.compressed import find_files
from shards.formats.layout import Layout, repeated
from shards.formats.seen import is_of_files, look_at, require_seen
from shards.formats.stream import Mark, place
from shards.records import Checked, Dataset, Document, Qrels

_READERS = {"beir": beir.read_layout, "dpr": dpr.read_layout, "msmarco": msmarco.read_layout}
# A folder has a layout where it has one of these files.
_TELLING_FILES = {
    "beir": ("corpus.jsonl", "queries.jsonl"),
    "dpr": ("psgs*.tsv", "biencoder-*.json"),
    "msmarco": ("collection.tsv",),
}


def open_dataset(
    path: Path,
    format: Literal["auto", "beir", "dpr", "msmarco"] = "auto",
    *,
    on_unknown_docid: Literal["error", "drop"] = "error",
    checked: Checked | None = None,
    needs_queries: bool = True,
) -> Dataset:
    """Read a data folder and check all of it.

    Args:
        path: The folder.
        format: Its layout; `auto` looks at the names of its files.
        on_unknown_docid: What a judgement of a document that the corpus lacks does: stop, or be dropped and counted
            (for a corpus that is a part of the one that was judged).
        checked: What another process or an earlier start found when it opened the folder; the corpus is not gone
            through again then, and what it says of the files is compared with their sizes.
        needs_queries: Whether a corpus without queries and judgements is refused; what of them is there is read.

    Returns:
        The data set. Documents without title and text that no judgement names, queries without a positive, and queries
        of no split are left out and counted. A document with a title but no text stays: its title is its text.

    Raises:
        DataError: There is no such layout; a file is missing, empty, not UTF-8 or malformed; a field is missing; an id
            repeats or is unknown; a judged document is empty; or a split keeps no query.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(
            f"there is no folder {path}",
            expected="a data folder",
            remedy="correct the path (data.path of a recipe); a relative one begins where the command is typed",
        )
    if format not in ("auto", *_READERS):
        raise DataError(
            f"there is no format {format!r}",
            expected=f"one of auto, {', '.join(_READERS)}",
            remedy="files of other forms: `sparring convert` makes a data folder of them",
        )
    description = canonical.read_description(path) if format in ("auto", "beir") else None
    if checked and checked.files:
        require_seen(path, checked)
    if description:
        name, seen = "beir", look_at(path, [path / canonical.DESCRIPTION_NAME, *map(path.joinpath, description.files)])
        hashed = checked is None or not checked.files
        layout = canonical.read_layout(path, description, needs_queries=needs_queries, hashed=hashed)
        dropped = layout.dropped + layout.judgements.dropped
        checked = Checked(description.fingerprint, description.num_documents, files=seen)
    else:
        name = _layout_of(path) if format == "auto" else format
        layout = _READERS[name](path, needs_queries=needs_queries)
        dropped = layout.dropped + layout.judgements.dropped
        if checked is None or not is_of_files(checked, path, layout.files):
            checked = _check(path, layout, drop_unknown=on_unknown_docid == "drop")
        dropped.update(checked.dropped)
    qrels = _usable(path, layout, dropped)
    if unjudged := len(layout.queries) - len({qid for judged in layout.judgements.qrels.values() for qid in judged}):
        dropped["query without a judgement"] += unjudged
    used = {qid for judged in qrels.values() for qid in judged}
    dataset = Dataset(
        path=path,
        format=name,
        queries={qid: query for qid, query in layout.queries.items() if qid in used},
        qrels=qrels,
        dropped=dropped,
        fingerprint=checked.fingerprint,
        num_documents=checked.num_documents,
        read_documents=lambda: _documents(layout),
        exclusions=layout.exclusions,
        read_given=layout.read_given,
        checked=checked,
    )
    if layout.corpus.suffix == ".jsonl":
        _let_blocks_be_read(dataset, layout.corpus)
    return dataset


def _layout_of(path: Path) -> str:
    if len(found := _layouts_in(path)) == 1:
        return found[0]
    expected = "; ".join(f"{name}: {' or '.join(patterns)}" for name, patterns in _TELLING_FILES.items())
    if found:
        raise DataError(
            f"{path} looks like {' and '.join(found)}", expected=expected, remedy="name the layout with data.format"
        )
    there = sorted(path.iterdir())
    folders = [one for one in there if one.is_dir() and _layouts_in(one)]
    raise DataError(
        f"{path} has no known layout: it holds {listed((one.name for one in there), 8) or 'nothing'}",
        expected=expected,
        remedy=f"name {' or '.join(map(str, folders[:3]))}, which has one"
        if folders
        else f"`sparring convert {path} --out DIR` makes a data folder of what BEIR, MS MARCO, DPR, TREC and the "
        "hub give out, and of jsonl and Parquet",
    )


def _layouts_in(path: Path) -> list[str]:
    return [name for name, patterns in _TELLING_FILES.items() if any(find_files(path, one) for one in patterns)]


def _let_blocks_be_read(dataset: Dataset, corpus: Path) -> None:
    """Let a corpus of one JSON object a line be read from its middle."""

    def read(offset: int, num_before: int) -> Iterator[Document]:
        return (one for _, one in beir.read_corpus(corpus, Mark(offset, num_before)) if not _is_empty(one))

    dataset.find_blocks = lambda size: find_blocks(corpus, size, dataset.num_documents)
    dataset.read_block = read


def _is_empty(document: Document) -> bool:
    # `isspace` ends at the first letter, where `strip` would copy the text.
    return (not document.text or document.text.isspace()) and (not document.title or document.title.isspace())


def _documents(layout: Layout) -> Iterator[Document]:
    return (document for _, document in layout.read_corpus() if not _is_empty(document))


def _check(path: Path, layout: Layout, *, drop_unknown: bool) -> Checked:
    seen, dropped = look_at(path, layout.files), Counter[str]()  # seen first: a change during the check counts as one
    num_documents = _check_corpus(layout, dropped, drop_unknown=drop_unknown)
    return Checked(_fingerprint(path, layout.files), num_documents, dict(dropped), seen)


def _check_corpus(layout: Layout, dropped: Counter[str], *, drop_unknown: bool) -> int:
    """Stream the corpus once: ids unique, judged documents present and not empty. Return the number kept."""
    named = layout.judgements.named
    unknown, hashes, kept = set(named), array("q"), 0
    for line, document in layout.read_corpus():
        hashes.append(hash(document.id))
        if document.id in named:
            unknown.discard(document.id)
        if not _is_empty(document):
            kept += 1
        elif document.id in named:
            raise DataError(
                f"{place(layout.corpus, line)}: document {document.id!r} has neither text nor title, but "
                f"{place(*named[document.id])} judges it",
                remedy="give it a text, or remove it and its judgements",
            )
        else:
            dropped["document without text"] += 1
    _require_unique_ids(layout, np.frombuffer(hashes, dtype=np.int64))
    if not kept:
        raise DataError(
            f"{layout.corpus} has no document with text",
            expected="at least one",
            remedy="give the documents a text or a title",
        )
    if unknown:
        if not drop_unknown:
            docid = min(unknown, key=lambda docid: (str(named[docid][0]), named[docid][1]))
            raise DataError(
                f"{place(*named[docid])} judges document {docid!r}, which is not in {layout.corpus} "
                f"({len(unknown)} judged documents are not)",
                expected=f"the id of one of its {len(hashes)} documents",
                remedy="complete the corpus, remove the rows, or put files together that belong together",
            )
        for judged in layout.judgements.qrels.values():
            for grades in judged.values():
                for docid in unknown & grades.keys():
                    del grades[docid]
                    dropped["judgement of a document that the corpus lacks"] += 1
    return kept


def _require_unique_ids(layout: Layout, hashes: np.ndarray) -> None:
    """Compare hashes first: two ids rarely share one, and only those that do are looked at again."""
    ordered = np.sort(hashes)
    suspects = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    if not suspects:
        return
    lines: dict[str, int] = {}
    for line, document in layout.read_corpus():
        if hash(document.id) in suspects:
            if document.id in lines:
                raise repeated("document", document.id, layout.corpus, lines[document.id], line)
            lines[document.id] = line


def _usable(path: Path, layout: Layout, dropped: Counter[str]) -> dict[str, Qrels]:
    """Leave out the queries that nothing can be learnt or scored from; a split that loses all is an error."""
    usable = {}
    for split, judged in layout.judgements.qrels.items():
        kept = {
            qid: grades
            for qid, grades in judged.items()
            if split in layout.answer_splits or any(grade > 0 for grade in grades.values())
        }
        if lost := len(judged) - len(kept):
            dropped[f"query without a positive ({split})"] += lost
        if not kept:
            raise DataError(
                f"the split {split!r} of {path} has no usable query: {len(judged)} are judged, none has a positive",
                expected="at least one query with a grade above 0",
                remedy="complete the split's file, or remove it",
            )
        usable[split] = kept
    return usable


def _fingerprint(path: Path, files: list[Path]) -> str:
    return canonical.fingerprint_of({file.relative_to(path).as_posix(): sha256_file(file) for file in files})
