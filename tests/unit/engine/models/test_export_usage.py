"""What an export's README says runs as it stands, in every library, and gives our scores."""

from __future__ import annotations

import functools
import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.errors import ArtifactError, ConfigError, ModelError
from engine.models import export_onnx as onnx
from engine.models.ending import with_end
from engine.models.export import export_model
from engine.models.export_parts import padded_documents, padded_queries
from engine.models.export_usage import FOLDER, readme, usage_of
from engine.models.lexical import Lexical
from engine.models.loading import load_tokenizer
from engine.models.ranker import Ranker
from engine.models.retriever import Retriever
from engine.models.source import saved_metadata
from engine.models.template import InputTemplate
from tests.distributed.tiny_architectures import make
from tests.snippets import run_snippet, snippets_of

pytest.importorskip("sentence_transformers")
METADATA = {"max_length": 24, "query_max_length": 12, "template": "{title}: {text}", "base": "random"}
PROMPTS = {"query": "the ranker "}


def ranker_of(base: Path, folder: Path, head: Any, **options: Any) -> Path:
    ranker = Ranker.load(str(base), head=head, seed=3, **options)
    with torch.no_grad():
        for name in ranker.head_names:
            ranker.get_parameter(name).mul_(20)  # scores well apart
    tokenizer = load_tokenizer(str(base))
    ranker.save(folder, with_end(tokenizer, "it", "ranker") if head == "last" else tokenizer, metadata=METADATA)
    return folder


def dual_of(model: Retriever | Lexical, base: Path | str, folder: Path) -> Path:
    """Save a retriever whose towers, where it has two, differ."""
    model.prompts = {**model.prompts, **PROMPTS}
    for number, tower in enumerate(model.towers.values()):
        weight = next(one for name, one in tower.named_parameters() if name.endswith("layer.0.output.dense.weight"))
        torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(number))
    model.save(folder, load_tokenizer(str(base)), metadata=METADATA)
    return folder


def expected_scores(weights: Path, queries: list[str], documents: list[str]) -> torch.Tensor:
    """Score by our own model, of the inputs that it is trained on."""
    metadata, tokenizer = saved_metadata(weights), load_tokenizer(str(weights))
    with torch.inference_mode():
        if metadata["model"] == "ranker":
            template = InputTemplate.from_tokenizer(tokenizer, pair_words=metadata.get("pair_template"))
            asked = template.queries.token_ids(tokenizer, queries)[0]
            others = template.documents.token_ids(tokenizer, documents)
            rows = [template.pair(asked, row, metadata["max_length"]) for row in others]
            return Ranker.open(weights)(template.pad(rows))
        model = (Retriever if metadata["model"] == "retriever" else Lexical).open(weights)
        template = InputTemplate.from_tokenizer(tokenizer, metadata.get("prompts", {}))
        queries_BD = model.encode_queries(padded_queries(template, tokenizer, queries, 12))
        documents_ND = model.encode_documents(padded_documents(template, tokenizer, documents, 24))
        return queries_BD @ documents_ND.T


def dense(**options: Any) -> Callable[[Any, Any], Path]:
    def make(base: Any, folder: Path) -> Path:
        return dual_of(Retriever.load(str(base), **options), base, folder)

    return make


MODELS: dict[str, Callable[[Any, Any], Path]] = {
    "towers": dense(pooling="mean", similarity="cosine", tied=False),
    "lexical": lambda base, folder: dual_of(Lexical.load(str(base)), base, folder),
    "lexical-towers": lambda base, folder: dual_of(Lexical.load(str(base), tied=False), base, folder),
    "ranker-mean": lambda base, folder: ranker_of(base, folder, "mean"),
}


def require_our_scores(weights: Path, export: Path, workplace: Path) -> list[str]:
    """Run the pieces of a README by which texts are scored, and compare; return all pieces."""
    codes = snippets_of((export / "README.md").read_text(encoding="utf-8"))
    assert len(codes) >= 2, "one for sentence-transformers, one for transformers"
    for code in codes[:2]:
        names = run_snippet(code, workplace, {FOLDER: export})
        expected = expected_scores(weights, names["queries"], names["documents"])
        found = torch.as_tensor(names["scores"])
        torch.testing.assert_close(found.float(), expected, atol=1e-5, rtol=1e-5)
        assert len(names["documents"]) == 2
        assert names["documents"][0].startswith("Containers: ")
        assert expected.flatten()[0] != expected.flatten()[1]
    return codes


@pytest.mark.parametrize("name", MODELS)
def test_what_a_readme_says_gives_our_scores(random_model: Path, tmp_path: Path, name: str) -> None:
    weights = MODELS[name](random_model, tmp_path / "w")
    export_model(weights, tmp_path / "e")
    require_our_scores(weights, tmp_path / "e", tmp_path / "place")


def asking(base: Path, folder: Path) -> Path:
    """Save a ranker that asks a language model."""
    words = "Judge.\n<Query>: {query}\n<Document>: {document}<|im_end|>\nSo:"
    ranker = Ranker.load(str(base), head="yes_no", answers=("yes", "no"))
    ranker.save(folder, load_tokenizer(str(base)), metadata={**METADATA, "max_length": 96, "pair_template": words})
    return folder


DECODERS: dict[str, Callable[[Any, Any], Path]] = {
    "last": lambda base, folder: decoder_of(base, folder),
    "ranker-last": lambda base, folder: ranker_of(base, folder, "last"),
    "ranker-yes-no": asking,
}


def decoder_of(base: Path, folder: Path) -> Path:
    model = Retriever.load(str(base), pooling="last", similarity="cosine", tied=True)
    model.prompts = PROMPTS
    model.save(folder, with_end(load_tokenizer(str(base)), "it", "retriever"), metadata=METADATA)
    return folder


@pytest.mark.parametrize("name", DECODERS)
def test_what_a_decoders_readme_says_gives_our_scores(tmp_path: Path, name: str) -> None:
    base = make("qwen3", tmp_path / "lm", max_position_embeddings=128)
    weights = DECODERS[name](base, tmp_path / "w")
    export_model(weights, tmp_path / "e")
    require_our_scores(weights, tmp_path / "e", tmp_path / "place")
    if name == "ranker-yes-no":
        with pytest.raises(ConfigError, match=r"w asks a language model: .* no tokenizer\.json"):
            onnx.export_onnx(weights, tmp_path / "w")


def test_layers_above_the_pooling_are_in_the_code(made_folder: Any, tmp_path: Path) -> None:
    start = made_folder(tmp_path / "start", dense=((16, "torch.nn.modules.activation.Tanh"),))
    weights = dense(pooling="mean", similarity="dot", tied=True)(start, tmp_path / "w")
    export_model(weights, tmp_path / "e")
    _, code = require_our_scores(weights, tmp_path / "e", tmp_path / "place")
    assert '("2_Dense", torch.nn.Tanh())' in code


def test_a_published_name_stands_in_the_code(random_model: Path, tmp_path: Path) -> None:
    """Whoever reads a card on the hub copies code that loads from there, and nothing else in it is another."""
    weights = MODELS["ranker-mean"](random_model, tmp_path / "w")
    export_model(weights, tmp_path / "e")
    here = snippets_of(readme(tmp_path / "e", saved_metadata(weights)))
    there = snippets_of(usage_of(tmp_path / "e", saved_metadata(weights), "me/mine"))
    fetched = 'from huggingface_hub import snapshot_download\n\nfolder = snapshot_download("me/mine")'
    assert there[0] == here[0].replace(FOLDER, "me/mine")
    assert there[1] == here[1].replace(f'folder = "{FOLDER}"', fetched)


# --- ONNX ------------------------------------------------------------------------------------------------------------

ONE_LAYER: dict[str, Callable[[Any, Any], Path]] = {
    "towers": dense(pooling="mean", similarity="cosine", tied=False, num_layers=1),
    "lexical": lambda base, folder: dual_of(Lexical.load(str(base), num_layers=1), base, folder),
    "ranker": lambda base, folder: ranker_of(base, folder, "pooler", num_layers=1),
}
"""As small as models are, since following one takes seconds."""


@pytest.fixture(scope="module")
def graphs(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Return weights and export of a model, made once."""
    pytest.importorskip("onnxruntime")

    @functools.cache
    def make(name: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(name)
        weights = ONE_LAYER[name](random_model, folder / "w")

        def complete(export: Path) -> None:
            onnx.export_onnx(weights, export)
            (export / "README.md").write_text(readme(export, saved_metadata(weights)), encoding="utf-8")

        export_model(weights, folder / "e", complete)
        return weights, folder / "e"

    return make


@pytest.mark.parametrize("name", ONE_LAYER)
def test_onnxruntime_gives_our_numbers_for_any_batch_and_length(graphs: Any, tmp_path: Path, name: str) -> None:
    """Six lines of the README; then batches of one and of many, of one token and of more than the model reads."""
    weights, export = graphs(name)
    *_, code = snippets_of((export / "README.md").read_text(encoding="utf-8"))
    assert len(code.partition("import numpy")[2].strip().splitlines()) == 6
    names = run_snippet(code, tmp_path / "place", {FOLDER: export})
    tokenizer, session, texts = names["tokenizer"], names["session"], ["?", "word " * 90, "naïve café", "Lists, tuples"]
    if name == "ranker":
        expected_N = expected_scores(weights, names["queries"], names["documents"])
        np.testing.assert_allclose(names["scores"], expected_N, atol=1e-4)
    for chosen in (texts[:1], texts[1:2], texts):
        batch = tokenizer.encode_batch([("what is it?", text) for text in chosen] if name == "ranker" else chosen)
        form = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
        fed = {one.name: np.array([getattr(row, form[one.name]) for row in batch]) for one in session.get_inputs()}
        (found,) = session.run(None, fed)
        if name == "ranker":
            expected = expected_scores(weights, ["what is it?"], chosen)
        else:
            model, own = (Retriever if name == "towers" else Lexical).open(weights), load_tokenizer(str(weights))
            length = 12 if name == "towers" else 24
            with torch.inference_mode():
                expected = model.encode_queries(padded_queries(InputTemplate.from_tokenizer(own), own, chosen, length))
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-4, rtol=1e-4)


def test_an_onnx_file_that_gives_other_numbers_is_no_export(
    graphs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer that cuts elsewhere than the model gave other scores of long texts."""
    (weights, export), cut = graphs("ranker"), onnx._write_tokenizer

    def earlier(tokenizer: Any, path: Path, part: Any) -> None:
        cut(tokenizer, path, replace(part, max_length=part.max_length - 6))

    monkeypatch.setattr(onnx, "_write_tokenizer", earlier)
    monkeypatch.setattr(onnx, "_write_graph", lambda *given: shutil.copy(export / "onnx" / "score.onnx", given[2]))
    with pytest.raises(ArtifactError, match="differ from ours by"):
        export_model(weights, tmp_path / "e", lambda folder: onnx.export_onnx(weights, folder))
    assert not (tmp_path / "e").exists()


def test_a_model_that_cannot_be_followed_is_told(tmp_path: Path, random_model: Path) -> None:
    """torch's own message is pages long, and says nothing of what to do."""
    pytest.importorskip("onnxscript")

    class Choosing(torch.nn.Module):
        def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            ids_NL = batch["input_ids"]
            return ids_NL.float() if ids_NL.sum() > 3 else -ids_NL.float()

    form = Retriever.load(str(random_model), pooling="cls", similarity="dot", tied=True).form
    part = onnx._Part("", Choosing(), form, 8, InputTemplate.from_tokenizer(load_tokenizer(str(random_model))))
    with pytest.raises(
        ModelError, match=r"torch .* cannot follow this retriever into an ONNX graph: Could not guard.*leave --onnx"
    ):
        onnx._write_graph(part, ["input_ids", "attention_mask"], tmp_path / "x.onnx", "out", "retriever")


def test_what_onnx_needs_is_told_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    with pytest.raises(ConfigError, match=r"onnxscript cannot be imported.*sparring\[onnx\]"):
        onnx.require_onnx({"retriever": "retriever"})
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="encoder is pre-trained and not yet a retriever"):
        onnx.require_onnx({"encoder": "bottleneck"})
