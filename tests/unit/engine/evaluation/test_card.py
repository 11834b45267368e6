"""What a card says of a model's choice, data and recipe, and that no folder of the machine is in it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from engine.config.timetable import WeightsOf
from engine.coordination.coordinator import Coordinator, LocalTransport
from engine.evaluation.card import Carded, shortened, write_card
from engine.evaluation.verdict import Taken
from engine.models.source import write_metadata
from engine.models.weights import PublishedWeights
from engine.run import Run
from shards.files import write_json
from tests.unit.launcher.commands.made_runs import MadeRun, made_data

METADATA = {"model": "ranker", "max_length": 64, "template": "{title} {text}", "head": "pooler"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    folder = tmp_path_factory.mktemp("cards")
    license = folder / "start" / "LICENSE"
    license.parent.mkdir()
    license.write_text("terms")
    (license.parent / "config.json").write_text("{}")
    (license.parent / "model.safetensors").write_bytes(b"weights")
    run = MadeRun(folder / "mine", made_data(folder / "data"), f"ranker.name={license.parent}")
    for iteration in ("001", "002"):
        published = run.folder / "weights" / "ranker" / iteration / "weights.json"
        published.parent.mkdir(parents=True)
        write_json(published, asdict(PublishedWeights(iteration * 10, {})))
    return run


def card_after(made: MadeRun, target: Path, iteration: int, taken: Taken | None) -> ModelCard:
    """Write the card of the ranker after an iteration, of a run that took one."""
    ledger = json.loads((made.folder / "ledger.json").read_text())
    ledger["stages"].pop("take", None)
    if taken is not None:
        ledger["stages"]["take"] = {"seconds": 1.0, "result": asdict(taken)}
    (made.folder / "ledger.json").write_text(json.dumps(ledger))
    run = Run.reopen(made.folder, Coordinator(LocalTransport()), torch.device("cpu"))
    target.mkdir()
    write_metadata(target, METADATA)
    write_card(target, Carded(run, WeightsOf("ranker", iteration), iteration))
    return ModelCard.load(target / "README.md")


def test_a_choice_by_dev_is_told_and_test_is_kept_apart(made: MadeRun, tmp_path: Path) -> None:
    card = card_after(made, tmp_path / "e", 2, Taken(2, "best on dev by MRR@10"))
    limits = " ".join(card.text.partition("## Limits")[2].split())
    assert "**Dev chose it**: of the iterations 0 to 2, 2 is best on dev by MRR@10, the retriever's." in limits
    assert "higher than those of new queries; test chose nothing" in limits
    assert "at putting what a retriever found into another order" in limits
    metrics = card.text.partition("## Metrics")[2].partition("## Data")[0]
    assert "This model is `D`, iteration 2 in the tables" in metrics
    assert "| D over G, top 10" in metrics
    assert "not measured there" not in metrics
    splits = {one.dataset_split for one in card.data.eval_results}
    assert splits == {"dev", "test"}
    assert {one.dataset_config for one in card.data.eval_results} == {"top 10 of G"}


def test_an_iteration_that_was_not_measured_on_test_says_so(made: MadeRun, tmp_path: Path) -> None:
    card = card_after(made, tmp_path / "e", 1, Taken(2, "best on dev by MRR@10"))
    assert "Iteration 1 was asked for by hand. The run itself takes 2: best on dev by MRR@10." in card.text
    assert "### test (this model was not measured there)" in card.text
    assert {one.dataset_split for one in card.data.eval_results} == {"dev"}
    before = card_after(made, tmp_path / "before", 1, None)
    assert "the run has recorded no choice among its iterations" in before.text


def test_a_start_models_terms_are_taken_along_and_no_folder_is_told(made: MadeRun, tmp_path: Path) -> None:
    card = card_after(made, tmp_path / "e", 2, Taken(2, "the last"))
    assert (card.data.license, card.data.license_link) == ("other", "LICENSE")
    assert (tmp_path / "e" / "LICENSE").read_text() == "terms"
    assert "It began as `…/start` and was trained by Sparring, recipe `ar2`." in card.text
    assert str(made.folder.parent) not in card.content
    assert f"`{'002' * 10}`" in card.text, "the weights by which artifacts are stamped"
    assert f"`{made.dataset.fingerprint}`" in card.text
    assert "No split chose it: iteration 2 is the last." in card.text


def test_paths_have_their_last_part_alone() -> None:
    given = {"path": "/home/me/runs/nq", "names": ["~/models/a", "package:b", "me/mine"], "template": "{title}/{text}"}
    assert shortened(given) == {
        "path": "…/nq",
        "names": ["…/a", "package:b", "me/mine"],
        "template": "{title}/{text}",
    }
    words = ["/usr/bin/run.py", "run.path=/home/me/runs/nq", "data.path=~/nq", "ar2.iterations=2", "--config", "x.yaml"]
    assert shortened(words) == ["…/run.py", "run.path=…/nq", "data.path=…/nq", *words[3:]]
