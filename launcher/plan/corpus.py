"""How large the data are: counted where that is cheap, given on the command line, else guessed from file sizes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.config.recipe import Config
from engine.config.timetable import Sizes
from engine.errors import ConfigError
from shards.formats.canonical import read_description
from shards.manifest import MANIFEST_NAME, CorpusManifest

_COUNTED_BYTES = 64 * 2**20
"""Of a corpus, whose documents are lines; of a larger one, the rest is taken to be like its beginning."""
_CORPUS_FILES = ("psgs*.tsv", "collection*.tsv", "corpus*.jsonl")
_BESIDE_TEXT_BYTES = {".jsonl": 48, ".tsv": 12}
"""Of a line of a corpus: its id, names of fields, quotes and tabs."""
_PASSAGE_BYTES = 620.0
"""Of a passage of 100 words."""
_JUDGEMENTS = ("qrels/{}.tsv", "qrels.{}.tsv")
_HEADER = b"query-id"
_DEV_SHARE = 20
_GENERATED = {"train": 1.4, "dev": 0.3, "test": 0.3}
"""Queries a document of the made-up set, by split."""
_BYTES_PER_TOKEN = 4.7
"""Of English text in BERT's vocabulary, spaces included."""
_BYTES_PER_WORD = 6.0


@dataclass(frozen=True, slots=True)
class Corpus:
    """Sizes that everything else follows from."""

    documents: int
    train: int
    dev: int
    test: int
    text_bytes: float
    """Of a document on average, its title included."""
    tokens: float
    """Of a document in the shards on average, special tokens not counted, before it is cut to a model's length."""
    sources: tuple[str, ...]
    """Where the numbers come from, in words."""
    terms: float = 180.0
    """Of a document in a lexical retriever's vectors on average."""

    @property
    def words(self) -> float:
        """Of a document on average."""
        return self.text_bytes / _BYTES_PER_WORD

    @property
    def sizes(self) -> Sizes:
        """What a timetable depends on."""
        return Sizes(self.train, self.documents)


def corpus_of(
    config: Config,
    *,
    documents: int | None = None,
    queries: int | None = None,
    dev: int | None = None,
    test: int | None = None,
    text_bytes: float | None = None,
    terms: float = 180.0,
) -> Corpus:
    """Find the sizes of a recipe's data; the corpus itself is never gone through.

    Args:
        config: The recipe; `data.path` is looked at where it is there.
        documents: Takes the place of what is found.
        queries: Of the train split.
        dev: Of the dev split, before `evaluation.max_dev_queries`.
        test: Of the test split.
        text_bytes: Of a document on average; None for what the corpus file tells, or a passage of 100 words.
        terms: Of a document in a lexical retriever's vectors on average.

    Raises:
        ConfigError: Nothing tells how many documents or training queries there are.
    """
    found, notes = _found(config)
    given = {"documents": documents, "train": queries, "dev": dev, "test": test}
    told = [name for name, number in given.items() if number is not None]
    if told:
        notes = [note for note in notes if note.split(":")[0] not in told]
        notes.append(f"{', '.join(told)}: as given")
    sizes = found | {name: number for name, number in given.items() if number is not None}
    if "documents" not in sizes or "train" not in sizes:
        missing = [name for name in ("documents", "train") if name not in sizes]
        place = config.data.path if config.data.path is not None else "the recipe, which names no data.path"
        raise ConfigError(
            f"the number of {' and of '.join({'train': 'training queries'}.get(one, one) for one in missing)} is not "
            f"known from {place}",
            expected="a folder that `sparring convert` made, or numbers",
            remedy="give --documents N and --queries N (for Natural Questions: 21015324 and 58880)",
        )
    if sizes["documents"] < 1 or sizes["train"] < 1:
        raise ConfigError(
            f"{sizes['documents']} documents and {sizes['train']} training queries are given",
            expected="at least one of each",
        )
    for name in ("dev", "test"):
        if name not in sizes:
            sizes[name] = max(1, sizes["train"] // _DEV_SHARE)
            notes.append(f"{name}: a {_DEV_SHARE}th of the training queries, assumed")
    if text_bytes is None:
        text_bytes, how = _text_bytes(config, found.get("documents"))
    else:
        how = " (as given)"
    notes.append(f"text: {text_bytes:.0f} bytes a document{how}, {text_bytes / _BYTES_PER_TOKEN:.0f} tokens, assumed")
    return Corpus(
        sizes["documents"],
        sizes["train"],
        sizes["dev"],
        sizes["test"],
        text_bytes,
        text_bytes / _BYTES_PER_TOKEN,
        tuple(notes),
        terms,
    )


def _text_bytes(config: Config, documents: int | None) -> tuple[float, str]:
    """Return the bytes of a document on average, and how they are known."""
    path = config.data.path
    files = [file for pattern in _CORPUS_FILES for file in path.glob(pattern)] if path is not None else []
    if not files or documents is None:
        return _PASSAGE_BYTES, ""
    beside = _BESIDE_TEXT_BYTES[files[0].suffix]
    whole = sum(file.stat().st_size for file in files) / documents
    return max(1.0, whole - beside), f" (by the size of {files[0].name})"


def _found(config: Config) -> tuple[dict[str, int], list[str]]:
    """Return what the data folder says of itself, and how that is known."""
    path = config.data.path
    if path is None:
        if "path" in config.data.model_fields_set or "generated_documents" in config.data.model_fields_set:
            number = config.data.generated_documents
            sizes = {"documents": number} | {name: round(number * share) for name, share in _GENERATED.items()}
            return sizes, [f"{name}: of the made-up set" for name in sizes]
        return {}, []
    if not path.is_dir():
        return {}, []
    if (description := read_description(path)) is not None:
        sizes = {"documents": description.num_documents}
        for split in ("train", "dev", "test"):
            if f"qrels/{split}.tsv" in description.kept:
                sizes[split] = description.kept[f"qrels/{split}.tsv"]
        return sizes, [f"{name}: dataset.json (of queries, their judgements)" for name in sizes]
    sizes, notes = {}, []
    for manifest in sorted((path / "shards").glob(f"*/{MANIFEST_NAME}")):
        sizes["documents"] = CorpusManifest.load(manifest.parent).num_documents
        notes = [f"documents: {manifest}"]
    files = [file for pattern in _CORPUS_FILES for file in path.glob(pattern)]
    if "documents" not in sizes and files:
        numbers = [_lines_of(file) for file in files]
        sizes["documents"] = max(1, sum(number for number, _ in numbers))
        exact = all(is_exact for _, is_exact in numbers)
        how = f"lines of {files[0].name}" if exact else "guessed from the first 64 MiB; --documents N is exact"
        notes = [f"documents: {how}"]
    for split in ("train", "dev", "test"):
        judged = [path / name.format(split) for name in _JUDGEMENTS if (path / name.format(split)).is_file()]
        if judged:
            sizes[split] = max(1, len(_queries_of(judged[0])))
            notes.append(f"{split}: queries in {judged[0].relative_to(path)}")
    return sizes, notes


def _lines_of(path: Path) -> tuple[int, bool]:
    """Return about how many lines a file has, and whether it is exactly so many."""
    size, lines, read = path.stat().st_size, 0, 0
    with open(path, "rb") as file:
        while read < _COUNTED_BYTES and (chunk := file.read(2**20)):
            lines += chunk.count(b"\n")
            read += len(chunk)
    return (lines, True) if read >= size else (round(lines * size / read), False)


def _queries_of(path: Path) -> set[bytes]:
    """Return the ids of the queries that a file of judgements names."""
    with open(path, "rb") as file:
        found = {line.split(None, 1)[0] for line in file if line.strip()}
    return found - {_HEADER}
