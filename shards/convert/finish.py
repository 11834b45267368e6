"""From raw files to outputs: repeated and unknown ids are found on disk, and rows that have them refused or left out.

Each output is made under a temporary name and renamed; whatever is interrupted is done again with the same result.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from shards.convert.appended import lines_of
from shards.convert.ids import first_like, flag_repeated, flag_unknown, place_of, read_flags
from shards.convert.options import Options
from shards.convert.outputs import RAW, id_log
from shards.convert.regroup import RawTraining, regroup
from shards.convert.sources import Source
from shards.errors import DataError
from shards.files import write_atomically
from shards.formats.canonical import CORPUS, QUERIES
from shards.formats.layout import repeated
from shards.formats.stream import place

FINAL, FLAGS = "final", "flags"
_JUDGED = ("qrels/", "exclusions/")
HEADER = b"query-id\tcorpus-id\tscore\n"


class Finisher:
    """Makes one output after the other.

    Args:
        folder: The partial folder.
        sources: The files that were read, for errors.
        options: The conversion's options.
        rows: Output -> number of records of its raw file.
    """

    def __init__(self, folder: Path, sources: list[Source], options: Options, rows: dict[str, int]) -> None:
        self._folder, self._sources, self._options, self._rows = folder, sources, options, rows
        self._dropped: Counter[str] = Counter()

    def names(self) -> list[str]:
        """Return the outputs in the order in which they must be made: judgements before what they complete."""
        order = {CORPUS: 0, QUERIES: 1, "qrels": 2, "exclusions": 2, "training": 3, "runs": 4}
        return sorted(self._rows, key=lambda name: (order[name.split("/")[0]], name))

    def make(self, name: str) -> tuple[int, dict[str, int], Path]:
        """Make an output under a temporary name.

        Args:
            name: One of `names()`.

        Returns:
            Records kept; reason -> records dropped; and the file, which the caller renames to `final_path(name)`.

        Raises:
            DataError: An id repeats or is unknown, and the options do not say to drop it.
        """
        self._dropped = Counter()
        raw, made = self._folder / RAW / name, self._folder / FLAGS / f"{Path(name).name}.made"
        if name.startswith("training/"):
            kept = self._write_training(name, made)
        else:
            rows = {CORPUS: self._identified, QUERIES: self._identified}.get(name, self._paired)(name)
            if rows is None:
                return self._rows[name], {}, raw
            with write_atomically(made) as temporary, open(temporary, "wb") as file:
                kept = 0
                file.write(HEADER if name.startswith(_JUDGED) else b"")
                for row in rows:
                    file.write(row)
                    kept += 1
        return kept, dict(self._dropped), made

    def final_path(self, name: str) -> Path:
        """Return where a finished output lies until all are published."""
        return self._folder / FINAL / name

    def _identified(self, name: str) -> Iterator[bytes] | None:
        """Check ids of documents or queries; None where nothing is to be left out."""
        again, num_again = self._flags(name, "key")
        return self._first_only(name, again) if num_again else None

    def _first_only(self, name: str, again: Path | None) -> Iterator[bytes]:
        what = "document" if name == CORPUS else "query"
        same, _ = self._flags(name, "same")
        rows = zip(self._raw(name), read_flags(again), read_flags(same), strict=False)
        for number, (row, is_again, is_same) in enumerate(rows):
            if not is_again:
                yield row
            elif is_same:
                self._dropped[f"{what} given twice"] += 1
            else:
                if self._options.on_error == "error":
                    raise self._repeated(what, json.loads(row)["_id"], id_log(name, "key"), number)
                self._dropped[f"{what} id that an earlier {what} has"] += 1

    def _paired(self, name: str) -> Iterator[bytes] | None:
        """Check judgements or rows of a run."""
        queries, num_queries = self._flags(name, "query", QUERIES)
        documents, num_documents = self._flags(name, "document", CORPUS)
        again, num_again = self._flags(name, "pair")
        same, _ = self._flags(name, "same")
        if not (num_queries or num_documents or num_again) and not name.startswith(_JUDGED):
            return None
        return self._known_pairs(name, [queries, documents, again, same], num_documents)

    def _known_pairs(self, name: str, flags: list[Path | None], num_unknown: int) -> Iterator[bytes]:
        what = "judgement" if name.startswith(_JUDGED) else "row of a run"
        rows = zip(self._raw(name), *(read_flags(path) for path in flags), strict=False)
        for number, (row, no_query, no_document, is_again, is_same) in enumerate(rows):
            columns = row.decode().split()
            qid, docid = columns[0], columns[1 if name.startswith(_JUDGED) else 2]
            if no_query:
                self._unknown("query", qid, what, id_log(name, "query"), number, self._options.on_error)
            elif no_document:
                policy = self._options.on_unknown_docid
                self._unknown("document", docid, what, id_log(name, "document"), number, policy, num_unknown)
            elif is_same:
                self._dropped[f"{what} given twice"] += 1
            elif is_again:
                if self._options.on_error == "error":
                    raise self._repeated(what, f"{qid} {docid}", id_log(name, "pair"), number)
                self._dropped[f"{what} that contradicts an earlier one"] += 1
            else:
                yield row

    def _write_training(self, name: str, made: Path) -> int:
        kept, dropped = regroup(
            self._known_training(name),
            self.final_path(f"qrels/{Path(name).stem}.tsv"),
            made,
            size=(self._folder / RAW / name).stat().st_size,
        )
        self._dropped += dropped
        return kept

    def _known_training(self, name: str) -> Iterator[RawTraining]:
        queries, _ = self._flags(name, "query", QUERIES)
        documents, num_unknown = self._flags(name, "document", CORPUS)
        unknown, ordinal = read_flags(documents), 0
        for number, (row, no_query) in enumerate(zip(self._raw(name), read_flags(queries), strict=False)):
            qid, positives, negatives, scores, proposed_by = json.loads(row)
            lost = list(islice(unknown, len(positives) + len(negatives)))
            if no_query:
                self._unknown("query", qid, "training record", id_log(name, "query"), number, self._options.on_error)
            for place_in_row, is_lost in enumerate(lost):
                if is_lost and not no_query:
                    docid = [*positives, *negatives][place_in_row]
                    what = "positive" if place_in_row < len(positives) else "negative"
                    log, policy = id_log(name, "document"), self._options.on_unknown_docid
                    self._unknown("document", docid, what, log, ordinal + place_in_row, policy, num_unknown)
            ordinal += len(lost)
            if no_query:
                continue
            of_negatives = lost[len(positives) :]
            had_positives = bool(positives)
            positives = [docid for docid, is_lost in zip(positives, lost, strict=False) if not is_lost]
            kept = [place_in_row for place_in_row, is_lost in enumerate(of_negatives) if not is_lost]
            yield RawTraining(
                qid,
                positives,
                negatives=[negatives[place_in_row] for place_in_row in kept],
                scores=[scores[place_in_row] for place_in_row in kept],
                proposed_by=[proposed_by[place_in_row] for place_in_row in kept],
                had_positives=had_positives,
            )

    def _raw(self, name: str) -> Iterator[bytes]:
        return lines_of(self._folder / RAW / name)

    def _flags(self, name: str, role: str, known: str = "") -> tuple[Path | None, int]:
        """Flag the repeated ids of a log, or those that are not among the keys of `known`."""
        log = self._folder / id_log(name, role)
        if not log.exists():
            return None, 0
        flags = self._folder / FLAGS / f"{Path(name).name}.{role}"
        flags.parent.mkdir(parents=True, exist_ok=True)
        if not known:
            return flags, flag_repeated(log, flags)
        keys = self._folder / id_log(known, "key")
        if not keys.exists():
            keys.parent.mkdir(parents=True, exist_ok=True)
            keys.touch()
        return flags, flag_unknown(log, keys, flags)

    def _unknown(
        self, kind: str, identifier: str, what: str, log: str, ordinal: int, policy: str, number: int = 0
    ) -> None:
        if policy == "drop":
            self._dropped[
                f"{what} of a {kind} that the {'corpus lacks' if kind == 'document' else 'queries lack'}"
            ] += 1
            return
        source, line = place_of(self._folder / log, ordinal)
        among = f"the corpus ({number} such rows)" if kind == "document" else "the queries"
        raise DataError(
            f"{place(self._sources[source].path, line)} has a {what} of {kind} {identifier!r}, which is not in {among}",
            expected=f"the id of one of {self._rows.get(CORPUS if kind == 'document' else QUERIES, 0)}",
            remedy="put files together that belong together, or leave such rows out by "
            + ("--on-unknown-docid drop" if kind == "document" else "--on-error drop"),
        )

    def _repeated(self, what: str, identifier: str, log: str, ordinal: int) -> DataError:
        path = self._folder / log
        source, line = place_of(path, ordinal)
        first_source, first_line = place_of(path, first_like(path, ordinal))
        if source == first_source:
            return repeated(what, identifier, self._sources[source].path, first_line, line)
        return DataError(
            f"{what} id {identifier!r} is on {place(self._sources[first_source].path, first_line)}, and with another "
            f"content on {place(self._sources[source].path, line)}",
            expected=f"each {what} once",
            remedy="name sources that belong together, or keep the first of them by --on-error drop",
        )


def clear_flags(folder: Path) -> None:
    """Remove what was only needed to make one output."""
    for path in sorted((folder / FLAGS).glob("*")):
        os.unlink(path)
