"""A small corpus in shards, and the tokenizer whose tokens it holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.models.bottleneck import BottleneckLM
from engine.models.loading import load_tokenizer, tokenizer_fingerprint
from engine.models.random import make_random_model
from engine.models.template import InputTemplate
from engine.pretrain.documents import MaskedInputBuilder
from engine.pretrain.masking import MaskRates
from shards.manifest import TokenStream
from shards.reader import CorpusShards
from shards.records import Document
from shards.writer import Tokenization, begin_corpus, publish_manifest, write_shard

WORDS = "the decoder reads a state of the encoder and predicts what it cannot see".split()  # noqa: SIM905
TEXTS = (*(" ".join((WORDS * 3)[first : first + 5 + 3 * first]) for first in range(9)), "", "see [SEP] text")
"""Of 5 to 29 words; one empty, one with a special token in its text."""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_model(tmp_path_factory.mktemp("pretrain") / "model", TEXTS)


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Any:
    return load_tokenizer(str(folder))


@pytest.fixture(scope="session")
def model(folder: Path) -> BottleneckLM:
    return BottleneckLM.load(str(folder), dropout=0.0)


@pytest.fixture(scope="session")
def corpus(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> CorpusShards:
    target = tmp_path_factory.mktemp("corpus") / "shards"
    stream = TokenStream("encoder", tokenizer_fingerprint(tokenizer), 64)

    def ids(strings: list[str]) -> Any:
        return tokenizer(strings, add_special_tokens=False)["input_ids"]

    documents = [Document(id=f"d{number}", title="", text=text) for number, text in enumerate(TEXTS)]
    begin_corpus(target, {})
    write_shard(documents, target, 0, 0, [Tokenization(stream, ids)], "{text}")
    publish_manifest(
        target, (one.id for one in documents), dataset_sha256="0" * 64, template="{text}", streams=[stream]
    )
    return CorpusShards.open(target)


@pytest.fixture(scope="session")
def builder_of(corpus: CorpusShards, tokenizer: Any, model: BottleneckLM) -> Callable[..., MaskedInputBuilder]:
    """Return what makes builders; by default with the rates of the paper, packed, and long enough for all texts."""

    def make(
        *, encoder: float = 0.3, decoder: float = 0.5, max_length: int = 64, packs: bool = True
    ) -> MaskedInputBuilder:
        collate = model.collator(InputTemplate.from_tokenizer(tokenizer))
        if not packs:
            collate = type(collate)(collate.template, False, collate.first_position)
        rates = MaskRates(encoder, decoder)
        return MaskedInputBuilder(corpus, "encoder", tokenizer, collate, rates, max_length=max_length, seed=7)

    return make
