"""What goes into DeepSpeed's configuration, and who owns which number; engines themselves are tested on real ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.config.models import ModelConfig
from engine.config.training import OptimConfig
from engine.errors import ConfigError
from engine.training import backend
from engine.training.backend import deepspeed_config, require_precision

OPTIM = OptimConfig(lr=1e-4, max_grad_norm=2.0)


def written(folder: Path, settings: Any) -> Path:
    path = folder / "deepspeed.json"
    path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return path


def config_with(path: Path, **fields: Any) -> ModelConfig:
    return ModelConfig(name="random", deepspeed=path, **fields)


@pytest.mark.parametrize("stage", range(4))
def test_the_file_of_each_stage_is_found_and_completed(stage: Any) -> None:
    settings = deepspeed_config(ModelConfig(name="random", zero_stage=stage), OPTIM)
    assert settings["zero_optimization"]["stage"] == stage
    assert settings["gradient_clipping"] == 2.0
    assert settings["gradient_accumulation_steps"] == settings["train_micro_batch_size_per_gpu"] == 1
    assert "fp16" not in settings
    assert "bf16" not in settings


@pytest.mark.parametrize(
    ("precision", "section"), [("bf16", {"enabled": True, "check_grad_overflow": True}), ("fp16", {"loss_scale": 0})]
)
def test_precision_comes_from_the_recipe(precision: Any, section: dict[str, Any]) -> None:
    settings = deepspeed_config(ModelConfig(name="random", precision=precision), OPTIM)
    assert section.items() <= settings[precision].items()
    assert settings[precision]["enabled"] is True
    assert {"bf16", "fp16"} & settings.keys() == {precision}


@pytest.mark.parametrize(
    "key",
    [
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "optimizer",
        "scheduler",
        "fp16",
        "bf16",
    ],
)
def test_a_file_that_sets_a_number_of_ours_is_refused(key: str, tmp_path: Path) -> None:
    path = written(tmp_path, {"zero_optimization": {"stage": 1}, key: 1})
    with pytest.raises(ConfigError, match=rf"deepspeed\.json sets {key}\..*Remedy: remove them"):
        deepspeed_config(config_with(path), OPTIM)


def test_all_clashes_are_named_at_once(tmp_path: Path) -> None:
    path = written(tmp_path, {"zero_optimization": {"stage": 1}, "optimizer": {}, "bf16": {}})
    with pytest.raises(ConfigError, match="sets bf16, optimizer"):
        deepspeed_config(config_with(path), OPTIM)


def test_other_settings_of_a_file_are_kept(tmp_path: Path) -> None:
    path = written(tmp_path, {"zero_optimization": {"stage": 2, "overlap_comm": True}, "steps_per_print": 7})
    settings = deepspeed_config(config_with(path, zero_stage=2), OPTIM)
    assert settings["zero_optimization"]["overlap_comm"] is True
    assert settings["steps_per_print"] == 7


def test_a_file_of_another_stage_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, {"zero_optimization": {"stage": 3}})
    with pytest.raises(ConfigError, match=r"stage 3, the recipe zero_stage 1"):
        deepspeed_config(config_with(path), OPTIM)


@pytest.mark.parametrize("content", ['{"zero_optimization": ', "[]", '"text"'])
def test_a_file_that_is_no_json_object_is_refused(content: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"deepspeed\.json"):
        deepspeed_config(config_with(written(tmp_path, content)), OPTIM)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json cannot be read.*Remedy: name a JSON file"):
        deepspeed_config(config_with(tmp_path / "none.json"), OPTIM)


def test_a_numeric_type_that_the_machine_does_not_train_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 on a CPU without it ended in DeepSpeed's traceback, after the shards were written."""

    class Accelerator:
        def is_fp16_supported(self) -> None:  # as DeepSpeed's CPU says no
            return None

        def is_bf16_supported(self) -> bool:
            return True

        def device_name(self) -> str:
            return "cpu"

    monkeypatch.setattr(backend, "get_accelerator", Accelerator)
    for precision in ("fp32", "bf16"):
        require_precision(ModelConfig(name="random", precision=precision), "ranker")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"does not train on the cpu .*set ranker\.precision=bf16"):
        require_precision(ModelConfig(name="random", precision="fp16"), "ranker")
