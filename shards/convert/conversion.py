"""The conversion itself: read all sources, finish each output, publish the folder.

    OUT/.partial/journal.json     how far it is
    OUT/.partial/raw, ids         what was read so far, and the hashes of its ids
    OUT/.partial/final            outputs that are whole
    OUT/dataset.json              written last: from here on the folder is a data set

A process that is killed at any moment leaves a journal from which the same command goes on, and the outcome is, byte
for byte, that of a start that nothing disturbed.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from shards.convert.appended import explain_full_disk
from shards.convert.finish import Finisher, clear_flags
from shards.convert.journal import Finished, Journal, describe_inputs, differences, locked, may_go_on, read_journal
from shards.convert.options import Options
from shards.convert.outputs import Outputs
from shards.convert.read import read_source
from shards.convert.sources import Source, find_sources
from shards.errors import ArtifactError, DataError, listed
from shards.files import fsync, sha256_file, write_json
from shards.formats.canonical import (
    CORPUS,
    DESCRIPTION_NAME,
    PARTIAL_NAME,
    Contents,
    Description,
    NamedContents,
    check_files,
    read_description,
)
from shards.formats.compressed import SUFFIXES
from shards.formats.stream import BadRecord, Mark

_RECORDS_PER_LOOK = 200
"""Records between two looks at the clock."""


class Progress(Protocol):
    """What shows how far a conversion is."""

    def begin(self, stage: str, total_bytes: int) -> None:
        """Begin a stage of so many bytes."""

    def advance(self, num_bytes: int) -> None:
        """Count bytes as done."""


class NoProgress:
    """Shows nothing."""

    def begin(self, stage: str, total_bytes: int) -> None:
        """Show nothing."""

    def advance(self, num_bytes: int) -> None:
        """Show nothing."""


@dataclass(frozen=True)
class Report:
    """How a conversion ended.

    Attributes:
        path: The folder.
        description: What is in it.
        was_there: Whether the folder was there already, made of the same sources in the same way.
    """

    path: Path
    description: Description
    was_there: bool


def convert(
    paths: list[Path],
    out: Path,
    options: Options,
    *,
    force: bool = False,
    progress: Progress | None = None,
    checkpoint_seconds: float = 5.0,
) -> Report:
    """Make a data folder of downloads; interrupted, go on where it stopped; done already, do nothing.

    Args:
        paths: Folders and files to read.
        out: The folder to write.
        options: What the user chose.
        force: Replace a folder, or begin anew a conversion, that was made of other sources or with other options.
        progress: Shows how far it is.
        checkpoint_seconds: Seconds between two entries in the journal.

    Returns:
        What is in the folder now.

    Raises:
        DataError: A source is not usable, or `out` holds something else.
        DiskFullError: There is no more space; the same command goes on once there is.
    """
    out = Path(os.path.abspath(out))
    progress = progress or NoProgress()
    sources, ignored = find_sources(paths, options, out)
    _require_free(out)
    existing = read_description(out) if out.is_dir() and (out / DESCRIPTION_NAME).exists() else None
    partial = out / PARTIAL_NAME
    journal = read_journal(partial)
    if existing and journal is None and not force:
        progress.begin("hash sources", _size(sources))
        inputs, _ = describe_inputs(sources, None, progress.advance)
        if found := differences(inputs, asdict(options), existing.inputs, existing.options):
            raise _made_otherwise(f"{out} was made", found)
        check_files(out, existing, hashed=False)
        if partial.exists():  # the last start was killed while it tidied up
            with locked(partial):
                shutil.rmtree(partial)
        return Report(out, existing, was_there=True)
    work: Conversion | None = None
    with explain_full_disk(_existing(out), lambda: work.needed_bytes() if work else _size(sources)), locked(partial):
        progress.begin("hash sources", _size(sources))
        known = read_journal(partial)
        found_inputs = describe_inputs(sources, known, progress.advance)
        journal = _journal_for(found_inputs, options, known, partial, force=force)
        work = Conversion(out, sources, ignored, options, journal, progress, checkpoint_seconds)
        work.run(list(existing.files) if existing else [])
    description = read_description(out)
    if description is None:
        raise ArtifactError(f"{out / DESCRIPTION_NAME} is gone", remedy="run the same command again")
    return Report(out, description, was_there=False)


def _existing(path: Path) -> Path:
    """Make the folder to write, or say why that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{path} cannot be made: {error.strerror}", remedy="choose another --out") from None
    if not os.access(path, os.W_OK):
        raise DataError(f"{path} may not be written to", remedy="choose another --out, or change its permissions")
    return path


def _size(sources: list[Source]) -> int:
    return sum(path.stat().st_size for source in sources for path in (source.path, source.beside) if path)


def _require_free(out: Path) -> None:
    """Refuse to write among files that are not ours."""
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file", expected="a new folder", remedy="choose another --out")
    is_ours = (out / DESCRIPTION_NAME).exists() or (out / PARTIAL_NAME).exists()
    if out.is_dir() and not is_ours and any(out.iterdir()):
        raise DataError(
            f"{out} exists, and was not written by convert",
            expected=f"a new folder, or one with {DESCRIPTION_NAME}",
            remedy="choose another --out, or remove what is there",
        )
    if (out / DESCRIPTION_NAME).exists() and read_description(out) is None:
        raise DataError(f"{out / DESCRIPTION_NAME} was written by another program", remedy="choose another --out")


def _made_otherwise(what: str, found: list[str]) -> DataError:
    return DataError(
        f"{what} of other sources or with other options: {listed(found, 5, '; ')}",
        expected="the same command, which goes on or finds its work done",
        remedy="choose another --out, or begin anew with --force",
    )


def _journal_for(
    described: tuple[list[NamedContents], dict[str, int]],
    options: Options,
    journal: Journal | None,
    partial: Path,
    *,
    force: bool,
) -> Journal:
    """Go on with the journal that is there if it is this conversion's, else begin one."""
    inputs, times = described
    if journal is not None:
        if may_go_on(journal, options):
            journal.options = asdict(options)
        found = differences(inputs, asdict(options), journal.inputs, journal.options)
        if not found:
            journal.times = times
            return journal
        if journal.lengths and not force:  # one that has read nothing yet is no loss
            raise _made_otherwise(f"{partial.parent} holds an unfinished conversion", found)
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name == "journal.json":
            path.unlink()
    journal = Journal(inputs, asdict(options), times)
    journal.write(partial)
    return journal


class Conversion:
    """One conversion under way.

    Args:
        out: The folder to write.
        sources: The files to read, in order.
        ignored: Files that are not read -> why.
        options: What the user chose.
        journal: Where it stands.
        progress: Shows how far it is.
        checkpoint_seconds: Seconds between two entries in the journal.
    """

    def __init__(
        self,
        out: Path,
        sources: list[Source],
        ignored: dict[str, str],
        options: Options,
        journal: Journal,
        progress: Progress,
        checkpoint_seconds: float,
    ) -> None:
        self._out, self._partial, self._sources, self._ignored = out, out / PARTIAL_NAME, sources, ignored
        self._options, self._journal, self._progress = options, journal, progress
        self._checkpoint_seconds = checkpoint_seconds
        self._read_bytes = 0
        self._written: Callable[[], int] = lambda: 0

    def needed_bytes(self) -> int:
        """Estimate the bytes that are still to be written, from what the sources gave so far."""
        total, done = _size(self._sources), self._read_bytes
        written = self._written()
        return int(written / done * max(0, total - done)) if done and written else total

    def run(self, replaced: list[str]) -> None:
        """Do what is left.

        Args:
            replaced: Files of the conversion whose place this one takes.

        Raises:
            DataError: A source is not usable.
        """
        if self._journal.phase == "read":
            self._read()
        if self._journal.phase == "finish":
            self._finish(replaced)
        self._publish()

    # --- reading -----------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        journal = self._journal
        outputs = Outputs(
            self._partial,
            journal.lengths,
            journal.rows,
            journal.dropped,
            self._options,
            documents_may_repeat=any(source.kind == "json training" for source in self._sources),
        )
        self._written = lambda: outputs.written_bytes
        self._progress.begin("read", _size(self._sources))
        try:
            for number in range(journal.source):
                self._consumed(_size([self._sources[number]]))
            for number in range(journal.source, len(self._sources)):
                mark = Mark(**journal.mark)
                self._read_one(number, mark, outputs)
                journal.source, journal.mark = number + 1, {}
            self._require_unchanged()
            if not outputs.rows[CORPUS]:
                raise DataError(
                    "the sources hold no document",
                    expected="a corpus, such as collection.tsv, psgs_w100.tsv or corpus.jsonl",
                    remedy="name its file or folder, too, and the form of a file of another name by --format",
                )
            self._checkpoint(outputs, "finish")
        finally:
            outputs.close()

    def _require_unchanged(self) -> None:
        for source in self._sources:
            if source.path.stat().st_mtime_ns != self._journal.times[source.name]:
                raise DataError(
                    f"{source.path} changed while it was read",
                    remedy=f"wait until it is whole, remove {self._partial} and run the command again",
                )

    def _consumed(self, num_bytes: int) -> None:
        self._read_bytes += num_bytes
        self._progress.advance(num_bytes)

    def _read_one(self, number: int, mark: Mark, outputs: Outputs) -> None:
        source, next_checkpoint = self._sources[number], time.monotonic() + self._checkpoint_seconds
        if source.path.suffix not in SUFFIXES and mark.offset:
            self._consumed(mark.offset)
        for count, (line, found) in enumerate(read_source(source, mark, self._options, self._consumed), 1):
            try:
                if isinstance(found, BadRecord):
                    raise found
                outputs.check(found, source.path, line)
            except BadRecord as error:
                if self._options.on_error == "error":
                    raise
                outputs.dropped[f"{source.name}: {error.reason}"] += 1
                continue
            for item in found:
                outputs.add(item, number, line)
            if count % _RECORDS_PER_LOOK == 0 and time.monotonic() >= next_checkpoint:
                self._journal.source, self._journal.mark = number, asdict(mark)
                self._checkpoint(outputs, "read")
                next_checkpoint = time.monotonic() + self._checkpoint_seconds

    def _checkpoint(self, outputs: Outputs, phase: str) -> None:
        outputs.sync()
        journal = self._journal
        journal.lengths, journal.rows, journal.dropped = outputs.lengths(), dict(outputs.rows), dict(outputs.dropped)
        journal.phase = "finish" if phase == "finish" else "read"
        journal.write(self._partial)

    # --- finishing ---------------------------------------------------------------------------------------------------

    def _finish(self, replaced: list[str]) -> None:
        journal = self._journal
        finisher = Finisher(self._partial, self._sources, self._options, journal.rows)
        self._progress.begin("check ids", sum(journal.lengths.values()))
        for name in finisher.names():
            final = finisher.final_path(name)
            if name not in journal.finished or not final.exists():
                kept, dropped, made = finisher.make(name)
                journal.finished[name] = Finished(kept, dropped)
                journal.write(self._partial)
                final.parent.mkdir(parents=True, exist_ok=True)
                os.replace(made, final)
                fsync(final.parent)
                clear_flags(self._partial)
            self._progress.advance(sum(size for path, size in journal.lengths.items() if f"/{name}" in path))
        counts = {name: journal.finished[name].kept for name in finisher.names()}
        if not counts[CORPUS]:
            raise DataError("the sources hold no document that can be used", remedy="name the corpus, too")
        dropped = Counter(journal.dropped)
        for entry in journal.finished.values():
            dropped.update(entry.dropped)
        description = Description(
            inputs=journal.inputs,
            options=journal.options,
            kept=counts,
            dropped=dict(sorted(dropped.items())),
            ignored=self._ignored,
            answer_splits=sorted({source.split for source in self._sources if self._has_unjudged(source)}),
            files=self._hashed({name: finisher.final_path(name) for name in finisher.names()}),
        )
        journal.description, journal.replaced, journal.phase = description.as_dict(), replaced, "publish"
        journal.write(self._partial)

    def _has_unjudged(self, source: Source) -> bool:
        return source.kind == "answers" or (source.kind == "questions" and self._options.questions == "all")

    def _hashed(self, paths: dict[str, Path]) -> dict[str, Contents]:
        self._progress.begin("hash", sum(path.stat().st_size for path in paths.values()))
        files: dict[str, Contents] = {}
        for name, path in paths.items():
            files[name] = Contents(path.stat().st_size, sha256_file(path))
            self._progress.advance(path.stat().st_size)
        return files

    # --- publishing --------------------------------------------------------------------------------------------------

    def _publish(self) -> None:
        """Move the outputs to their places, then say that they are there; each step can be done again."""
        journal = self._journal
        assert journal.description is not None
        files = journal.description["files"]
        (self._out / DESCRIPTION_NAME).unlink(missing_ok=True)
        for name in journal.replaced:
            if name not in files:
                (self._out / name).unlink(missing_ok=True)
        for name in sorted(files, key=lambda name: name == CORPUS):
            source, target = self._partial / "final" / name, self._out / name
            if source.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(source, target)
                fsync(target.parent)
            elif not target.exists() or target.stat().st_size != files[name]["bytes"]:
                raise ArtifactError(f"{target} is gone or damaged", remedy="run the command again with --force")
        # Made in the partial folder, so that not even a temporary file of it can be left beside the outputs.
        write_json(self._partial / DESCRIPTION_NAME, journal.description)
        os.replace(self._partial / DESCRIPTION_NAME, self._out / DESCRIPTION_NAME)
        fsync(self._out)
        shutil.rmtree(self._partial)
