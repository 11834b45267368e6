"""Texts are cut, and inputs filled, on the right: in training, in what is saved, and in what others load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from engine.config.models import LexicalConfig, ModelConfig, RankerConfig, RetrieverConfig
from engine.errors import ArtifactError
from engine.models.agreement import require_agreement
from engine.models.export import export_model, export_ranker, verify_export
from engine.models.lexical import Lexical
from engine.models.loading import load_tokenizer
from engine.models.ranker import Ranker
from engine.models.retriever import Retriever
from engine.models.sides import TOKENIZER_FILE
from engine.models.wording import PLAIN

LENGTHS = {"max_length": 24, "query_max_length": 12}
LEFT = {"truncation": {"truncation_side": "left"}, "padding": {"padding_side": "left"}}
MODELS: dict[str, Callable[[str], Any]] = {
    "retriever": lambda name: Retriever.load(name, pooling="mean", similarity="cosine", tied=True),
    "towers": lambda name: Retriever.load(name, pooling="cls", similarity="dot", tied=False),
    "lexical": lambda name: Lexical.load(name),
    "ranker": lambda name: Ranker.load(name, seed=3),
    "ranker-mean": lambda name: Ranker.load(name, head="mean", seed=3),
}


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def to_the_left(random_model: Path, folder: Path, **sides: str) -> Path:
    """Copy the model, with a tokenizer whose settings have these sides."""
    shutil.copytree(random_model, folder)
    edit(folder / TOKENIZER_FILE, **sides)
    return folder


def sides_of(folder: Path) -> set[str]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {tokenizer.truncation_side, tokenizer.padding_side}


@pytest.mark.parametrize("ends_texts", [False, True])
def test_a_tokenizer_with_sides_on_the_left_cuts_and_fills_on_the_right(
    random_model: Path, tmp_path: Path, ends_texts: bool
) -> None:
    """Of a long query the end was read in training, of a long document the beginning."""
    folder = to_the_left(random_model, tmp_path / "left", truncation_side="left", padding_side="left")
    assert sides_of(folder) == {"left"}
    tokenizer = load_tokenizer(str(folder), ends_texts=ends_texts)
    assert (tokenizer.truncation_side, tokenizer.padding_side) == ("right", "right")
    (whole,) = PLAIN.token_ids(tokenizer, ["what is a container of documents?"])
    assert PLAIN.token_ids(tokenizer, ["what is a container of documents?"], limit=3) == [whole[:3]]
    tokenizer.save_pretrained(tmp_path / "saved")
    assert sides_of(tmp_path / "saved") == {"right"}


@pytest.mark.parametrize("sides", LEFT)
@pytest.mark.parametrize("kind", MODELS)
def test_an_export_cuts_and_fills_as_training_did(random_model: Path, tmp_path: Path, kind: str, sides: str) -> None:
    """The whole run was computed, then its export differed from our model, and so it did after each restart."""
    folder = to_the_left(random_model, tmp_path / "left", **LEFT[sides])
    MODELS[kind](str(folder)).save(tmp_path / "w", load_tokenizer(str(folder)), metadata=LENGTHS)
    for place in tmp_path.joinpath("w").rglob(TOKENIZER_FILE):
        assert sides_of(place.parent) == {"right"}
        edit(place, **LEFT[sides])  # as what an earlier version has published
    assert export_model(tmp_path / "w", tmp_path / "e") < 1e-6
    for place in tmp_path.joinpath("e").rglob(TOKENIZER_FILE):
        assert sides_of(place.parent) == {"right"}


@pytest.mark.parametrize("kind", MODELS)
def test_an_export_that_cuts_texts_on_the_left_is_noticed(random_model: Path, tmp_path: Path, kind: str) -> None:
    """The scores of an untrained ranker are so near 0 that those of other texts differed by less than was allowed."""
    tokenizer, name = load_tokenizer(str(random_model)), str(random_model)
    MODELS[kind](name).save(tmp_path / "w", tokenizer, metadata={"max_length": 400, "query_max_length": 300})
    export_model(tmp_path / "w", tmp_path / "e")
    for place in tmp_path.joinpath("e").rglob(TOKENIZER_FILE):
        edit(place, **LEFT["truncation"])
    with pytest.raises(ArtifactError, match=r"cuts a long text to other tokens than we do.*on the left"):
        verify_export(tmp_path / "w", tmp_path / "e", ["lists?"], ["a short text"])


def test_scores_near_0_are_compared_by_their_own_size(random_model: Path, tmp_path: Path) -> None:
    """Everything within 1e-4 passed, which is a large part of the scores of an untrained ranker."""
    ranker = Ranker.load(str(random_model), seed=3)
    with torch.no_grad():
        ranker.classifier.classifier.weight *= 1e-2
    ranker.save(tmp_path / "w", load_tokenizer(str(random_model)), metadata=LENGTHS)
    export_ranker(tmp_path / "w", tmp_path / "e")
    state = load_file(tmp_path / "e" / "model.safetensors")
    state["classifier.bias"] += 6e-5
    save_file(state, tmp_path / "e" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="differs from ours by") as refusal:
        verify_export(tmp_path / "w", tmp_path / "e")
    assert f"whole in {tmp_path / 'w'}" in refusal.value.remedy


@pytest.mark.parametrize(
    "section",
    [
        RetrieverConfig(name="start", pooling="mean", **LENGTHS),
        LexicalConfig(name="start", **LENGTHS),
        RankerConfig(name="start", max_length=24),
    ],
    ids=lambda section: section.kind,
)
def test_sides_on_the_left_are_told(random_model: Path, tmp_path: Path, section: ModelConfig) -> None:
    folder = to_the_left(random_model, tmp_path / "left", truncation_side="left", padding_side="left")
    cut, filled = require_agreement(section, str(folder), section.kind)
    assert cut.warns
    assert "the tokenizer of start cuts long texts on the left, here they are cut on the right" in cut.text
    assert not filled.warns
    assert "fills short inputs on the left" in filled.text
    edit(folder / TOKENIZER_FILE, truncation_side="right", padding_side="right")
    assert not require_agreement(section, str(folder), section.kind)
