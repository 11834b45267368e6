"""Published weights are named by their hash, and used only if they still have it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config.ar2 import Ar2Recipe
from engine.config.models import LexicalConfig
from engine.config.timetable import iteration_name
from engine.data.corpus import ModelText, model_texts
from engine.errors import ArtifactError, ModelError
from engine.models.lexical import Lexical
from engine.models.random import make_random_model
from engine.models.ranker import Ranker
from engine.models.retriever import Retriever
from engine.models.weights import frozen_lexical, frozen_ranker, frozen_retriever, weights_sha256
from engine.run import Run
from engine.training.publishing import publish_weights

Open = Callable[..., Run]
CPU = torch.device("cpu")


class Engine:
    """Stands for a DeepSpeed engine: a module, and the weights gathered from it."""

    def __init__(self, name: str, module: torch.nn.Module) -> None:
        self.name, self.module = name, module

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.module.state_dict().items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    return make_random_model(folder, ["a few words to make a vocabulary of"] * 2, hidden_size=16, num_layers=1)


@pytest.fixture
def run(open_run: Open, base: Path) -> Run:
    return open_run(f"retriever.name={base}", f"ranker.name={base}", "retriever.pooling=mean")


@pytest.fixture
def retriever(base: Path) -> Engine:
    return Engine("retriever", Retriever.load(str(base), pooling="mean", similarity="dot", tied=True))


@pytest.fixture
def text(run: Run, base: Path) -> ModelText:
    return model_texts(run.config, {"retriever": base})["retriever"]


def publish(run: Run, engine: Engine, text: ModelText, name: str = "001") -> Path:
    publish_weights(run, engine, text, name)  # type: ignore[arg-type]
    return run.folder.weights(engine.name, name)


def embed(model: Any) -> torch.Tensor:
    ids = torch.arange(5, 13).view(2, 4)
    with torch.no_grad():
        embeddings: torch.Tensor = model.encode_documents({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return embeddings


def test_what_is_published_is_what_was_trained(run: Run, retriever: Engine, text: ModelText) -> None:
    with torch.no_grad():
        next(retriever.module.parameters()).add_(0.5)  # as a training step would
    folder = publish(run, retriever, text)
    loaded = frozen_retriever(run.config.retriever, folder, CPU)
    torch.testing.assert_close(embed(loaded), embed(retriever.module.eval()))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded.training


def test_the_hash_is_that_of_the_weights_and_of_nothing_else(run: Run, retriever: Engine, text: ModelText) -> None:
    first, again = publish(run, retriever, text, "001"), publish(run, retriever, text, "002")
    assert weights_sha256(first) == weights_sha256(again)
    with torch.no_grad():
        next(retriever.module.parameters())[0, 0] += 1e-3
    assert weights_sha256(publish(run, retriever, text, "003")) != weights_sha256(first)


def test_publishing_again_replaces_and_leaves_nothing_behind(run: Run, retriever: Engine, text: ModelText) -> None:
    folder = publish(run, retriever, text)
    (folder.parent / f".{folder.name}.tmp").mkdir()  # what a start that was cut off left
    before = weights_sha256(folder)
    with torch.no_grad():
        next(retriever.module.parameters()).mul_(2)
    assert weights_sha256(publish(run, retriever, text)) != before
    assert [path.name for path in folder.parent.iterdir()] == ["001"]


def test_a_flipped_bit_is_noticed(run: Run, retriever: Engine, text: ModelText) -> None:
    folder = publish(run, retriever, text)
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"the weights in .*001 have sha256.*Expected: .*recorded when"):
        frozen_retriever(run.config.retriever, folder, CPU)


def test_a_missing_file_is_noticed(run: Run, retriever: Engine, text: ModelText) -> None:
    folder = publish(run, retriever, text)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match="the weights in"):
        frozen_retriever(run.config.retriever, folder, CPU)


def test_a_damaged_ranker_is_refused_too(run: Run, base: Path, text: ModelText) -> None:
    ranker = Engine("ranker", Ranker.load(str(base), seed=1))
    folder = publish(run, ranker, text)
    frozen_ranker(run.config.ranker, folder, CPU)
    marker = json.loads((folder / "weights.json").read_text())
    (folder / "weights.json").write_text(json.dumps({**marker, "sha256": "0" * 64}))
    with pytest.raises(ArtifactError, match="the weights in"):
        frozen_ranker(run.config.ranker, folder, CPU)


def test_a_ranker_with_another_head_is_published_and_frozen(open_run: Open, base: Path, text: ModelText) -> None:
    run = open_run(f"retriever.name={base}", f"ranker.name={base}", "retriever.pooling=mean", "ranker.head=mean")
    ranker = Ranker.load(str(base), head="mean", seed=1)
    folder = publish(run, Engine("ranker", ranker), text)
    frozen, own = frozen_ranker(run.config.ranker, folder, CPU), ranker.state_dict()
    assert frozen.head == "mean"
    assert all(torch.equal(value, own[name]) for name, value in frozen.state_dict().items())
    head = folder / "head" / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(head).items()}, head)
    with pytest.raises(ArtifactError, match="the weights in"):
        frozen_ranker(run.config.ranker, folder, CPU)


class WithLexical(Ar2Recipe):
    """AR2's recipe with a lexical retriever beside its models."""

    lexical: LexicalConfig


@pytest.mark.parametrize("tied", [True, False])
def test_a_lexical_retriever_is_published_and_frozen(run: Run, base: Path, tied: bool) -> None:
    tree = run.config.model_dump()
    tree["run"]["path"] = str(run.folder.path.parent / "lexical")
    tree["lexical"] = {"name": str(base), "tied": tied, "max_length": 24, "query_max_length": 12, "precision": "bf16"}
    own = Run.open(WithLexical.model_validate(tree), run.coordinator, CPU)
    engine = Engine("lexical", Lexical.load(str(base), tied=tied))
    with torch.no_grad():
        next(engine.module.parameters()).add_(0.1)  # of the tied embeddings, which are the head's too
    text = model_texts(own.config, {"lexical": base})["lexical"]
    folder = publish(own, engine, text)
    described = json.loads((folder / "sparring.json").read_text())
    assert (described["model"], described["tied"], described["max_length"]) == ("lexical", tied, 24)
    section = own.config.models["lexical"]
    assert isinstance(section, LexicalConfig)
    loaded = frozen_lexical(section, folder, CPU)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    expected_NV = embed(engine.module.eval())
    assert embed(loaded).dtype == torch.float32
    torch.testing.assert_close(embed(loaded), expected_NV, rtol=0.05, atol=0.05)
    assert float(expected_NV.max()) > 0.5
    with pytest.raises(ModelError, match="holds a lexical retriever"):
        Retriever.open(folder)
    next(folder.rglob("*.safetensors")).unlink()
    with pytest.raises(ArtifactError, match="the weights in"):
        frozen_lexical(section, folder, CPU)


def test_weights_that_no_stage_has_published_are_an_error(run: Run) -> None:
    with pytest.raises(ArtifactError, match="there are no published weights"):
        weights_sha256(run.folder.weights("retriever", "007"))


def test_inference_has_the_numeric_type_of_the_training(
    open_run: Open, base: Path, retriever: Engine, text: ModelText
) -> None:
    run = open_run(
        f"retriever.name={base}", f"ranker.name={base}", "retriever.pooling=mean", "retriever.precision=bf16"
    )
    loaded = frozen_retriever(run.config.retriever, publish(run, retriever, text), CPU)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert embed(loaded).dtype == torch.float32, "pooled embeddings are float32"


def test_iterations_are_named_so_that_they_sort() -> None:
    assert [iteration_name(number) for number in (0, 7, 12)] == ["000", "007", "012"]
