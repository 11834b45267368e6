"""What a run leaves for others: cards, code in them that runs, and an index that plain FAISS searches."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from engine.errors import ConfigError
from engine.models.export_usage import FOLDER
from launcher.commands import export
from tests.distributed.processes import ROOT
from tests.e2e.conftest import Finished
from tests.e2e.made import ranking_of, summary_of
from tests.snippets import run_snippet, snippets_of
from tests.stand_in_hub import TOKEN, stand_in_hub

PAGE = ROOT / "docs" / "exports.md"


@pytest.fixture(scope="module")
def run(tiny: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "run"
    shutil.copytree(tiny.folder, folder)
    return folder


def exporting(run: Path, **words: Any) -> None:
    """Give the command its words, as the parser leaves them."""
    left_out = dict.fromkeys(("iteration", "out", "models", "shards", "push"))
    switches = dict.fromkeys(("onnx", "index", "public"), False)
    export.run_command(argparse.Namespace(run=run, **{**left_out, **switches, **words}))


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


@pytest.mark.parametrize(
    ("model", "name", "pipeline"), [("retriever", "G", "sentence-similarity"), ("ranker", "D", "text-ranking")]
)
def test_a_run_writes_a_card_that_the_hub_reads(run: Path, model: str, name: str, pipeline: str) -> None:
    card = card_of(run / "export" / model)
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.license) == ("sentence-transformers", pipeline, "unknown")
    assert {"sentence-transformers", "ar2", "sparring"} <= set(data.tags)
    assert "began at random: no start model's licence" in card.text
    rows = [row for row in summary_of(run) if (row["system"], row["iteration"]) == (name, 2)]
    found = {(one.dataset_split, one.dataset_config, one.metric_name): one.metric_value for one in data.eval_results}
    assert found == {
        (row["split"], f"top 10 of {row['over']}" if row["over"] else None, metric): round(value, 4)
        for row in rows
        for metric, value in row["metrics"].items()
    }
    assert {row["split"] for row in rows} == {"dev", "test"}
    fingerprint = json.loads((run / "ledger.json").read_text())["stages"]["shards"]["result"]["dataset_sha256"]
    assert {one.dataset_revision for one in data.eval_results} == {fingerprint}
    errors = [one.metric_args for one in data.eval_results if one.metric_args]
    assert len(errors) == len(rows) == 2 * (1 + (model == "ranker")), "the standard error of the metric of comparison"


def test_a_card_tells_metrics_data_recipe_and_limits(run: Path) -> None:
    text = card_of(run / "export" / "retriever").text
    sections = {part.partition("\n")[0]: part for part in text.split("\n## ")}
    assert list(sections)[1:] == ["Usage", "Metrics", "Data", "Recipe", "Limits"]
    metrics = sections["Metrics"]
    assert metrics.index("### dev") < metrics.index("### test")
    assert "±" in metrics
    assert "The duel" in metrics
    assert "| fingerprint (SHA-256) " in sections["Data"]
    assert "`{title} {text}`" in sections["Data"]
    settings = yaml.safe_load(sections["Recipe"].partition("```yaml\n")[2].partition("```")[0])
    assert settings["ar2"]["iterations"] == 2
    assert "transformers" in sections["Recipe"]
    assert str(run.parent.parent) not in text, "whoever reads a card need not know the folders of the machine"
    assert settings["run"]["path"] == "…/run"
    assert "No split chose it: iteration 2 is the last." in sections["Limits"]
    assert "dev are of 16 of 90 queries" in " ".join(sections["Limits"].replace("its ", "").split())


@pytest.mark.parametrize("model", ["retriever", "ranker"])
def test_code_of_a_card_runs_as_it_stands(run: Path, tmp_path: Path, model: str) -> None:
    codes = snippets_of((run / "export" / model / "README.md").read_text(encoding="utf-8"))
    assert len(codes) == 2
    first, second = (run_snippet(code, tmp_path, {FOLDER: run / "export" / model}) for code in codes)
    scores, others = (torch.as_tensor(one["scores"]).float().flatten() for one in (first, second))
    torch.testing.assert_close(scores, others, atol=1e-5, rtol=1e-5)
    assert scores[0] != scores[1]


def test_six_lines_of_the_docs_find_in_plain_faiss_what_the_run_finds(run: Path, tmp_path: Path) -> None:
    exporting(run, out=tmp_path / "exported", index=True, models=["retriever"])
    (code,) = (one for one in snippets_of(PAGE.read_text(encoding="utf-8")) if "faiss.read_index" in one)
    assert sum(map(bool, code.splitlines())) == 6
    texts = {one["_id"]: one["text"] for one in map(json.loads, (run / "data" / "queries.jsonl").open())}
    ranking, compared = ranking_of(run / "results" / "test-G-002.trec"), 0
    names = run_snippet(code, tmp_path, {})
    assert len(names["ids"]) > 300
    tokenize = names["SentenceTransformer"](str(tmp_path / "exported" / "retriever")).tokenizer
    for qid, expected in ranking.items():
        if len(tokenize(texts[qid])["input_ids"]) > 16:  # where the run cuts a query
            continue
        asked = code.replace("who wrote the second letter?", texts[qid])
        assert texts[qid] in asked
        found = run_snippet(asked, tmp_path, {})
        docids = [found["ids"][row] for row in found["rows"][0][:10]]
        assert docids == [docid for docid, _ in expected[:10]]
        np.testing.assert_allclose(found["scores"][0][:10], [score for _, score in expected[:10]], rtol=1e-3, atol=1e-3)
        compared += 1
        if compared == 3:
            break
    assert compared == 3


def test_an_export_is_published_with_a_card_that_loads_from_there(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with stand_in_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        exporting(run, out=tmp_path / "e", iteration=0, push="acme/tiny", models=["retriever", "ranker"])
        assert capsys.readouterr().out.split() == [f"{hub.address}/acme/tiny-{one}" for one in ("retriever", "ranker")]
        for model in ("retriever", "ranker"):
            repository = hub.repositories[f"acme/tiny-{model}"]
            here = {path.relative_to(tmp_path / "e" / model).as_posix(): path.read_bytes()
                    for path in (tmp_path / "e" / model).rglob("*") if path.is_file()}  # fmt: skip
            assert repository.private
            assert repository.files == here
            card = repository.files["README.md"].decode()
            assert f'("acme/tiny-{model}")' in card
            assert FOLDER not in card
            assert "Iteration 0 was asked for by hand. The run itself takes 2" in card


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"public": True}, "--public says who sees what is published"),
        ({"models": ["student"]}, r"has no model 'student'.*one of retriever, ranker"),
        ({"push": "tiny"}, "no name of a repository: it has no owner"),
        ({"index": True, "models": ["ranker"]}, "no index to write: none of the models is a dense"),
    ],
)
def test_what_cannot_be_exported_is_refused(run: Path, tmp_path: Path, words: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        exporting(run, out=tmp_path / "e", **words)
    assert not (tmp_path / "e").exists()


def test_an_index_that_is_gone_is_told_before_any_work(run: Path, tmp_path: Path) -> None:
    shutil.move(run / "index" / "002", tmp_path / "002")
    try:
        with pytest.raises(ConfigError, match=r"no index to write for iteration 2: .*002 has none.*--index"):
            exporting(run, out=tmp_path / "e", index=True)
    finally:
        shutil.move(tmp_path / "002", run / "index" / "002")
    assert not (tmp_path / "e").exists()
