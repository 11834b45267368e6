"""Compiled layers compute what plain ones do, under the same names."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from engine.config.models import RankerConfig
from engine.errors import ConfigError, ModelError
from engine.models.compiled import compile_layers
from engine.models.kinds import load_untrained
from engine.models.ranker import Ranker
from tests.distributed.test_packed import make_batch


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling takes a C++ compiler")
def test_compiled_layers_give_the_same_scores_and_gradients(random_model: Path) -> None:
    plain, compiled = (Ranker.load(str(random_model), dropout=0.0, seed=1) for _ in range(2))
    assert compile_layers(compiled) == 2
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    for length in (9, 14):  # one compilation serves all sizes
        inputs: dict[str, Tensor] = {
            "input_ids": torch.arange(5, 5 + 3 * length).view(3, length) % 60,
            "attention_mask": torch.ones(3, length, dtype=torch.long),
        }
        gradients = []
        for model in (plain, compiled):
            model.zero_grad()
            scores_N = model(inputs)
            scores_N.sum().backward()
            gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
            if model is plain:
                expected_N = scores_N.detach()
        torch.testing.assert_close(scores_N.detach(), expected_N, atol=1e-5, rtol=1e-4)
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling takes a C++ compiler")
def test_packed_batches_of_any_layout_are_compiled_once(random_model: Path) -> None:
    """Symptom: each packed batch has another layout, and for each the layers were compiled anew, for minutes."""
    section = RankerConfig(name="x", compile_layers=True, dropout=0.0)
    plain = Ranker.load(str(random_model), dropout=0.0, seed=1)
    compiled = load_untrained(section, str(random_model), seed=1)
    assert compiled.packs
    graphs = []
    for seed, count in ((1, 3), (2, 5), (3, 9), (4, 1)):
        batch = make_batch("packed", seed, count)
        found_N = compiled(batch)
        found_N.sum().backward()
        torch.testing.assert_close(found_N.detach(), plain(batch).detach(), atol=1e-5, rtol=1e-4)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert len(set(graphs)) == 1


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ModelError, match=r"Linear has no list of layers.*set compile_layers to false"):
        compile_layers(nn.Linear(2, 2))


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_machine_without_a_compiler_is_refused(
    on_gpu: bool, random_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Symptom: the ranker's first step ends in a compiler's message, behind a retriever that is trained."""
    model = Ranker.load(str(random_model), dropout=0.0, seed=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    variable, language, found = ("CC", "C", "gcc") if on_gpu else ("CXX", r"C\+\+", "g++")
    monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=f"no {language} compiler. Expected: .*leave compile_layers out"):
        compile_layers(model)
    monkeypatch.setenv(variable, "theirs")
    with pytest.raises(ConfigError, match=f"compiler theirs .the environment's {variable}"):
        compile_layers(model)
    monkeypatch.delenv(variable)
    (tmp_path / found).touch(mode=0o755)
    assert compile_layers(model) == 2, "they are compiled at their first batch"
