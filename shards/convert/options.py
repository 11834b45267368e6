"""What a user can choose about a conversion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shards.formats.lines import MAX_COLUMN_CHARACTERS

FORMATS = ("auto", "dpr", "msmarco", "trec", "beir", "jsonl", "parquet", "hf")


@dataclass(frozen=True)
class Options:
    """Choices that shape the result; another choice is another data set.

    Attributes:
        format: Whose file names are looked for; `auto` knows them all.
        id: Column or field of a document's id, in jsonl, Parquet and Hugging Face data; None looks for usual names.
        title: The same for its title.
        text: The same for its text.
        split: The split of judgements, questions and runs whose file name names none.
        questions: Of DPR's questions for training and dev, those with a positive passage (`judged`); or also those of
            which answers alone are known (`all`): without a passage, and of the `.qa.csv` beside.
        on_error: What a record that cannot be used does: stop the conversion, or be dropped and counted.
        on_unknown_docid: The same for a judgement, negative or row of a run whose document the corpus lacks.
        max_document_characters: A document with more in its title and text together is a bad record.
    """

    format: str = "auto"
    id: str | None = None
    title: str | None = None
    text: str | None = None
    split: Literal["train", "dev", "test"] = "test"
    questions: Literal["judged", "all"] = "judged"
    on_error: Literal["error", "drop"] = "error"
    on_unknown_docid: Literal["error", "drop"] = "error"
    max_document_characters: int = MAX_COLUMN_CHARACTERS
