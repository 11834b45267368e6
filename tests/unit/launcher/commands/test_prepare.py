"""Shards that were prepared beside the data serve every run that they fit, and no other."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch

from engine.config.file import load_config
from engine.coordination.coordinator import Coordinator, LocalTransport
from engine.data.corpus import model_texts, open_data, write_shards
from engine.data.tokenization import WrittenCorpus
from engine.errors import ArtifactError, ConfigError, ModelError
from engine.models.loading import load_tokenizer
from engine.models.random import make_random_model
from engine.retrievers.bm25_index import index_text
from engine.retrievers.kinds import BM25, open_searcher
from engine.run import Run, Stage
from launcher.commands.finished import corpus_of
from launcher.commands.prepare import prepare_shards
from shards.convert.conversion import convert
from shards.convert.options import Options
from shards.formats import open_dataset
from shards.made.generated import generate_dataset
from shards.records import Query

TINY = Path(__file__).parents[4] / "configs" / "tiny.yaml"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    """Return a converted data folder with shards, the folder of the shards, and the words of the recipe."""
    folder = tmp_path_factory.mktemp("prepared")
    generate_dataset(folder / "raw", num_documents=40, seed=3)
    data = convert([folder / "raw"], folder / "data", Options()).path
    texts = [document.text for document in open_dataset(data).documents()]
    model = folder / "model"
    make_random_model(model, iter(texts), hidden_size=16, num_layers=1, num_heads=2, vocab_size=300, seed=1)
    words = [f"retriever.name={model}", f"ranker.name={model}", "data.documents_per_shard=7"]
    return data, prepare_shards(data, TINY, words), words


def opened(tmp_path: Path, data: Path, words: list[str]) -> tuple[Run, WrittenCorpus, object]:
    run = Run.open(
        load_config(TINY, [f"run.path={tmp_path / 'run'}", *words]), Coordinator(LocalTransport()), torch.device("cpu")
    )
    dataset = open_dataset(data)
    texts = model_texts(run.config, {name: section.name for name, section in run.config.models.items()})
    counts = run.once("shards", write_shards, dataset, texts, run.folder)
    return run, counts, open_data(run.config, dataset, texts, run.folder)


def test_a_run_reads_the_prepared_shards_and_index_in_place(
    tmp_path: Path, prepared: tuple[Path, Path, list[str]]
) -> None:
    """Symptom: each run of a sweep tokenised the same millions of passages and indexed them for BM25 once more."""
    data, folder, words = prepared
    run, counts, found = opened(tmp_path, data, words)
    assert counts.reused_shards == counts.shards == 6
    assert found.shards.folder == folder  # type: ignore[attr-defined]
    assert not run.folder.shards.exists()
    assert index_text(Stage(run, "bm25"), found, run.folder).reused  # type: ignore[arg-type]
    assert not run.folder.bm25.exists()
    searcher = open_searcher(run, found, run.folder, BM25)  # type: ignore[arg-type]
    document = found.shards.document(3)  # type: ignore[attr-defined]
    assert searcher.search([Query("q", document.text)], 1).documents_QK.tolist() == [[3]]


def test_a_run_on_prepared_shards_is_searched_without_the_data_wherever_the_shards_lie(
    tmp_path: Path, prepared: tuple[Path, Path, list[str]]
) -> None:
    """Symptom: to search a finished run, the whole data folder was needed, in its old place."""
    data, folder, words = prepared
    moved = tmp_path / "data"
    shutil.copytree(data, moved)
    run, counts, found = opened(tmp_path, moved, words)
    assert counts.prepared == str(moved / folder.relative_to(data))
    for model in ("retriever", "ranker"):
        shutil.copytree(data.parent / "model", run.folder.weights(model, "000"))
    for path in moved.iterdir():
        if path.name != "shards":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = Run.reopen(run.folder.path, Coordinator(LocalTransport()), torch.device("cpu"))
    alone = corpus_of(again, 0)
    assert alone.shards.manifest == found.shards.manifest  # type: ignore[attr-defined]
    documents = list(alone.dataset.documents())
    assert (len(documents), documents[3]) == (alone.dataset.num_documents, alone.shards.document(3))
    assert documents == list(open_dataset(data).documents()), "titles and texts are in the shards"
    elsewhere = tmp_path / "elsewhere"
    shutil.move(counts.prepared, elsewhere)
    with pytest.raises(ArtifactError, match=rf"are not in {counts.prepared}.*by --shards"):
        corpus_of(again, 0)
    assert corpus_of(again, 0, elsewhere).shards.document(3) == documents[3]


def test_prepared_shards_that_are_gone_are_told_as_such(tmp_path: Path, prepared: tuple[Path, Path, list[str]]) -> None:
    """Symptom: the manifest of RUN/shards was missed, which had never been there."""
    data, folder, words = prepared
    moved = tmp_path / "data"
    shutil.copytree(data, moved)
    run, _, found = opened(tmp_path, moved, words)
    shutil.rmtree(moved / folder.relative_to(data))
    with pytest.raises(ArtifactError, match=r"no shards of .* fit .* none beside the data .* --tokenize-for"):
        open_data(run.config, found.dataset, found.texts, run.folder)  # type: ignore[attr-defined]


def test_preparing_again_writes_nothing(
    prepared: tuple[Path, Path, list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    data, folder, words = prepared
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    with caplog.at_level(logging.INFO):
        assert prepare_shards(data, TINY, words) == folder
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before
    assert "there already" in caplog.text


def test_an_index_by_other_settings_of_bm25_is_the_runs_own(
    tmp_path: Path, prepared: tuple[Path, Path, list[str]]
) -> None:
    """Symptom guarded against: the index beside the data serves a recipe for another language, or stops it."""
    data, _, words = prepared
    run, _, found = opened(tmp_path, data, [*words, "bm25.language=none"])
    assert not index_text(Stage(run, "bm25"), found, run.folder).reused  # type: ignore[arg-type]
    assert run.folder.bm25.exists()
    assert open_searcher(run, found, run.folder, BM25).source == "bm25"  # type: ignore[arg-type]


@pytest.mark.parametrize("word", ["retriever.max_length=500", "data.template='{text}'"])
def test_a_recipe_that_they_do_not_fit_writes_its_own(
    tmp_path: Path, prepared: tuple[Path, Path, list[str]], word: str
) -> None:
    """Symptom: a recipe for longer passages trained on ones that had been cut for another."""
    data, folder, words = prepared
    run, counts, found = opened(tmp_path, data, [*words, word])
    assert counts.reused_shards == 0
    assert found.shards.folder == run.folder.shards != folder  # type: ignore[attr-defined]


def test_shorter_inputs_are_served_too(tmp_path: Path, prepared: tuple[Path, Path, list[str]]) -> None:
    data, folder, words = prepared
    _, _, found = opened(tmp_path, data, [*words, "retriever.max_length=16", "retriever.query_max_length=8"])
    assert found.shards.folder == folder  # type: ignore[attr-defined]


def test_random_models_cannot_be_prepared_for(prepared: tuple[Path, Path, list[str]]) -> None:
    with pytest.raises(ConfigError, match="random ones"):
        prepare_shards(prepared[0], TINY, [])


def test_a_tokenizer_that_the_model_has_no_embeddings_for(
    tmp_path: Path, prepared: tuple[Path, Path, list[str]]
) -> None:
    """Millions of passages were tokenised with ids that no run could compute."""
    data, _, words = prepared
    model = shutil.copytree(words[0].partition("=")[2], tmp_path / "model")
    tokenizer = load_tokenizer(str(model))
    tokenizer.add_tokens(["unheard-of"])
    tokenizer.save_pretrained(model)
    before = set(data.rglob("*"))
    with pytest.raises(ModelError, match=r"its model has .* embeddings.*ranker\.name=FOLDER"):
        prepare_shards(data, TINY, [*words, f"ranker.name={model}"])
    assert set(data.rglob("*")) == before
