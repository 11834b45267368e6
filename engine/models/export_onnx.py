"""A trained model as onnxruntime computes it: a graph from token ids to what the run uses, for any batch and length.

A retriever's graph ends in its pooled embedding, normalised where the run normalises it, a lexical one's in its weights
of words, a ranker's in its logit; so no library has to know what comes behind the last layer. Beside a graph lies a
tokenizer that cuts and pads by itself. What is written has been compared with our own model on ragged batches of texts.

    onnx/embedding.onnx  onnx/tokenizer.json           a tied retriever; `weights.onnx`, `score.onnx` of the other kinds
    onnx/query/...       onnx/document/...             one with two towers

Shapes: N inputs, L tokens, D numbers of a text, V words of the vocabulary.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.errors import ArtifactError, ConfigError, ModelError
from engine.log import get_logger
from engine.models.architecture import InputForm
from engine.models.dual import DOCUMENT, QUERY, SHARED
from engine.models.export_parts import largest_difference
from engine.models.export_usage import ONNX, ONNX_FILES, ONNX_RECORD
from engine.models.failures import quiet_transformers
from engine.models.lexical import Lexical, weigh
from engine.models.loading import load_tokenizer
from engine.models.ranker import Ranker
from engine.models.retriever import Retriever
from engine.models.source import kind_in_words, saved_metadata
from engine.models.template import Input, InputTemplate
from engine.models.wording import PLAIN
from engine.models.yes_no import YES_NO
from shards.files import write_json

log = get_logger(__name__)
MAX_DIFFERENCE = 1e-4
"""Largest difference from our numbers; relative to the largest of these where that is above 1."""
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
"""What the extra `onnx` installs."""
_OUTPUTS = {"retriever": "sentence_embedding", "lexical": "word_weights", "ranker": "score"}
"""What a graph's result is called; not as any step inside of it."""
_LARGEST_FILE_BYTES = 1_500_000_000
"""Of a graph with its weights; a protobuf ends at 2 GiB, so larger weights go into a file of their own beside it."""
_EXAMPLE = (3, 9)
"""Inputs and tokens of the batch by which a graph is followed; neither is kept as a constant."""
_COLOURS = re.compile(r"\x1b\[[\d;]*m")
_QUERY = "Who wrote the second letter, and when?"
_TEXTS = ("tables", "Lists, tuples and dictionaries are containers. " * 40, "naïve café 東京 42%", "word " * 600)


@dataclass(frozen=True, slots=True)
class OnnxRecord:
    """What lies beside a graph and says what it is."""

    inputs: list[str]
    """What it takes: int64 [N, L] each, N and L any."""
    output: str
    """What it gives: float32 [N, D], [N, V], or [N] of a ranker."""
    max_length: int
    """Tokens to which the tokenizer beside it cuts."""
    largest_difference: float
    """From our own model, on texts of all lengths; relative where numbers are above 1."""


@dataclass(frozen=True, slots=True)
class _Part:
    """A tower or a ranker, with what it is compared by."""

    folder: str
    module: nn.Module
    form: InputForm
    max_length: int
    template: InputTemplate
    prompt: str = ""


def require_onnx(kinds: Mapping[str, str]) -> None:
    """Refuse what could not be exported, before any work is done.

    Args:
        kinds: Model's name to its kind, or to its head where that is `yes_no`.

    Raises:
        ConfigError: A package is missing, a model gives neither an embedding nor a score, or a ranker asks a language
            model.
    """
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ConfigError(
            f"an ONNX file was asked for, and {', '.join(missing)} cannot be imported",
            expected="the packages of the extra onnx",
            remedy="pip install 'sparring[onnx]', or in a checkout pip install -e '.[onnx]'; or leave --onnx out",
        )
    if asked := [name for name, kind in kinds.items() if kind == YES_NO]:
        raise ConfigError(
            f"{asked[0]} asks a language model: what it reads of a pair is a template of words, which no "
            "tokenizer.json beside a graph makes",
            expected="a ranker with a head of its own",
            remedy="leave it out by --models, or leave --onnx out",
        )
    if strange := [name for name, kind in kinds.items() if kind not in ONNX_FILES]:
        raise ConfigError(
            f"{strange[0]} is pre-trained and not yet a retriever or a ranker: it has no ONNX form here",
            expected="a model that gives an embedding, weights of words, or a score",
            remedy="leave --onnx out",
        )


def export_onnx(weights_folder: Path, target: Path) -> None:
    """Write the graphs of a model and their tokenizers into its export.

    Args:
        weights_folder: Holds a retriever, a lexical retriever or a ranker of ours, with its lengths.
        target: The export; gets a folder `onnx`.

    Raises:
        ConfigError: As of `require_onnx`.
        ModelError: The architecture cannot be followed, or its tokenizer has no `tokenizer.json`.
        ArtifactError: The graph gives other numbers than our model.
    """
    metadata = saved_metadata(weights_folder)
    kind = str(metadata.get("model"))
    require_onnx({target.name: YES_NO if metadata.get("head") == YES_NO else kind})
    with quiet_transformers():
        parts = _parts(weights_folder, kind, metadata)
    tokenizer = load_tokenizer(str(weights_folder))
    for part in parts:
        folder = target / ONNX / part.folder
        folder.mkdir(parents=True)
        _write_tokenizer(tokenizer, folder / "tokenizer.json", part)
        inputs = ["input_ids", "attention_mask"]
        inputs += ["token_type_ids"] if part.template.has_type_ids and part.form.takes_types else []
        _write_graph(part, inputs, folder / ONNX_FILES[kind], _OUTPUTS[kind], kind_in_words(kind))
        difference = _compare(part, inputs, folder / ONNX_FILES[kind], tokenizer, is_pair=kind == "ranker")
        record = OnnxRecord(inputs, _OUTPUTS[kind], part.max_length, difference)
        write_json(folder / ONNX_RECORD, asdict(record))
        name = f"{part.folder}/{ONNX_FILES[kind]}".lstrip("/")
        log.info("%s %s: onnxruntime gives our numbers but for %.2g", kind_in_words(kind), name, difference)


class _Called(nn.Module):
    """Takes inputs one by one, as a graph has them."""

    def __init__(self, module: nn.Module, names: Sequence[str], compute: Callable[[dict[str, Tensor]], Tensor]) -> None:
        super().__init__()
        self.module, self._names, self._compute = module, names, compute

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._compute(dict(zip(self._names, inputs, strict=True)))


class _Side(nn.Module):
    """One side of a retriever: padded inputs to vectors."""

    def __init__(self, model: Retriever | Lexical, side: str) -> None:
        super().__init__()
        self.model, self.side = model, side

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        if isinstance(self.model, Lexical):  # whose own forward counts in how many blocks a batch is computed
            tower = self.model.towers[SHARED if self.model.tied else self.side]
            return weigh(tower(**batch).logits, batch["attention_mask"])
        return self.model.encode_queries(batch) if self.side == QUERY else self.model.encode_documents(batch)


def _parts(folder: Path, kind: str, metadata: Mapping[str, Any]) -> list[_Part]:
    tokenizer, length = load_tokenizer(str(folder)), int(metadata["max_length"])
    if kind == "ranker":
        ranker = Ranker.open(folder)
        return [_Part("", ranker, ranker.form, length, InputTemplate.from_tokenizer(tokenizer))]
    model = Retriever.open(folder) if kind == "retriever" else Lexical.open(folder)
    prompts = metadata.get("prompts", {})
    template = InputTemplate.from_tokenizer(tokenizer)
    if model.tied:
        return [_Part("", _Side(model, DOCUMENT), model.form, length, template)]
    lengths = {QUERY: int(metadata["query_max_length"]), DOCUMENT: length}
    return [
        _Part(side, _Side(model, side), model.form, lengths[side], template, prompts.get(side, "")) for side in lengths
    ]


def _write_tokenizer(tokenizer: Any, path: Path, part: _Part) -> None:
    """Write a tokenizer that cuts to a part's length and pads a batch to its longest input."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"the tokenizer is a {type(tokenizer).__name__}, which has no tokenizer.json",
            expected="one that the package tokenizers computes",
            remedy="leave --onnx out",
        )
    alone = type(backend).from_str(backend.to_str())
    alone.enable_truncation(max_length=part.max_length, strategy="longest_first")
    alone.enable_padding(pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token, direction="right")
    alone.save(str(path))


def _write_graph(part: _Part, inputs: Sequence[str], path: Path, output: str, called: str) -> None:
    batch = [torch.ones(_EXAMPLE, dtype=torch.int64) for _ in inputs]
    batch[1][0, _EXAMPLE[1] // 2 :] = 0  # one that is padded, so that nothing takes the mask for all ones
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in part.module.parameters())
    module = _Called(part.module, inputs, part.module).eval()
    try:
        with torch.inference_mode(False), torch.no_grad(), _quiet_exporter():
            program = torch.onnx.export(
                module,
                tuple(batch),
                dynamo=True,
                verbose=False,
                dynamic_shapes=(tuple(dims for _ in inputs),),
                input_names=list(inputs),
                output_names=[output],
                external_data=num_bytes > _LARGEST_FILE_BYTES,
            )
            assert program is not None, "torch.onnx.export returns a program by dynamo"
            program.save(path, external_data=num_bytes > _LARGEST_FILE_BYTES)
    except torch.onnx.OnnxExporterError as error:
        told = _COLOURS.sub("", str(error.__cause__ or error)).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"torch {torch.__version__} cannot follow this {called} into an ONNX graph: {told[0]}",
            expected="an architecture whose forward has no step that depends on the numbers",
            remedy="leave --onnx out; the export for transformers and sentence-transformers does not need it",
        ) from error


def _compare(part: _Part, inputs: Sequence[str], path: Path, tokenizer: Any, *, is_pair: bool) -> float:
    """Compare the graph by its own tokenizer with our model by ours, one text at a time and several together."""
    import onnxruntime  # type: ignore[import-untyped]
    from tokenizers import Tokenizer

    reader, session = Tokenizer.from_file(str(path.with_name("tokenizer.json"))), onnxruntime.InferenceSession(path)
    encoded = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    texts, differences = [part.prompt + text for text in _TEXTS], []
    ids = PLAIN.token_ids(tokenizer, texts)
    asked = PLAIN.token_ids(tokenizer, [_QUERY])[0]
    room = (part.max_length - part.template.num_special_pair) // 2
    asked, query = (asked, _QUERY) if len(asked) <= room else (PLAIN.token_ids(tokenizer, ["?"])[0], "?")

    def ours(rows: Sequence[Sequence[int]]) -> list[Input]:
        if is_pair:
            return [part.template.pair(asked, list(row), part.max_length) for row in rows]
        return [part.template.single(list(row), part.max_length) for row in rows]

    for chosen in ([0], [1], range(len(texts))):
        own = part.template.pad(ours([ids[number] for number in chosen]), 1)
        accepted = part.form.accepted(own)
        assert isinstance(accepted, dict), "padded batches stay padded"
        with torch.inference_mode():
            expected = part.module(accepted)
        given: list[Any] = [(query, texts[number]) if is_pair else texts[number] for number in chosen]
        batch = reader.encode_batch(given)
        arrays = {name: np.array([getattr(one, encoded[name]) for one in batch], dtype=np.int64) for name in inputs}
        differences.append(largest_difference(expected, torch.from_numpy(session.run(None, arrays)[0])))
    worst = max(differences)
    if not worst <= MAX_DIFFERENCE:  # also where it is NaN
        raise ArtifactError(
            f"onnxruntime gives numbers for {path} that differ from ours by {worst:.3g}",
            expected=f"at most {MAX_DIFFERENCE}",
            remedy="leave --onnx out; the export for transformers and sentence-transformers is compared by itself",
        )
    return worst


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Leave out what torch says of its own insides while it follows a model."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
