"""Layers in int8: within what rounding explains, token by token, and refused where they would not be int8."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from engine.config.file import load_config
from engine.errors import ConfigError, ModelError
from engine.models.fused import FusedLinear
from engine.models.quantized import QuantizedLinear, quantize_linear_layers
from engine.retrievers import dense
from engine.retrievers.dense import require_int8
from tests.distributed.processes import ROOT


def layer(num_inputs: int = 48, num_outputs: int = 24, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(num_inputs, num_outputs, bias=bias).eval()


@torch.inference_mode()
def test_a_layer_is_within_what_the_rounding_of_weights_and_inputs_explains() -> None:
    inputs_TI = torch.randn(30, 48) * torch.logspace(-3, 3, 30)[:, None]  # tokens of all sizes
    for bias in (True, False):
        linear = layer(bias=bias)
        weight_OI = linear.weight.double()
        exact_TO = inputs_TI.double() @ weight_OI.T + (linear.bias.double() if bias else 0)
        found_TO = QuantizedLinear(linear)(inputs_TI).double()
        step_of_input_T1 = inputs_TI.double().abs().amax(1, keepdim=True) / 127
        step_of_weight_O = weight_OI.abs().amax(1) / 127
        # Each number is off by half a step at most.
        of_inputs_TO = step_of_input_T1 / 2 * (weight_OI.abs() + step_of_weight_O[:, None] / 2).sum(1)
        bound_TO = of_inputs_TO + inputs_TI.double().abs().sum(1)[:, None] * step_of_weight_O / 2
        error_TO = (found_TO - exact_TO).abs()
        assert (error_TO <= 1.001 * bound_TO).all()
        assert error_TO.median() > 1e-3 * bound_TO.median(), "it is in float32"
        gelu = QuantizedLinear(linear, gelu=True)(inputs_TI).double()
        torch.testing.assert_close(gelu, nn.functional.gelu(found_TO), rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_a_large_token_does_not_cost_others_their_precision() -> None:
    """Symptom: with one scale for a batch, ten of a hundred hits were others."""
    linear, inputs_TI = layer(), torch.randn(6, 48)
    with_large_TI = torch.cat([inputs_TI, 1e4 * torch.randn(1, 48)])
    alone, beside = (QuantizedLinear(linear)(rows)[:6] for rows in (inputs_TI, with_large_TI))
    assert torch.equal(alone, beside)
    assert torch.equal(QuantizedLinear(linear)(torch.zeros(2, 48)), linear.bias.expand(2, -1))


@torch.inference_mode()
def test_layers_that_were_laid_out_anew_keep_their_gelu() -> None:
    linear, inputs_TI = layer(), torch.randn(9, 48)
    model = nn.Sequential(FusedLinear(linear, gelu=True), nn.ReLU(), layer(24, 24))
    expected = nn.functional.gelu(linear(inputs_TI))
    assert quantize_linear_layers(model) == 2
    assert [type(one).__name__ for one in model] == ["QuantizedLinear", "ReLU", "QuantizedLinear"]
    assert (model[0](inputs_TI) - expected).abs().max() < 0.05


def test_what_cannot_be_int8_is_refused() -> None:
    with pytest.raises(ModelError, match=r"parameters of torch.bfloat16 on cpu.*encode_int8=false"):
        quantize_linear_layers(nn.Sequential(layer()).bfloat16())
    with pytest.raises(ModelError, match="no linear layers"):
        quantize_linear_layers(nn.Sequential(nn.LayerNorm(4)))


@pytest.mark.parametrize(
    ("words", "device", "packs", "vnni", "told"),
    [
        ([], "cuda:1", True, True, "this rank computes on cuda:1"),
        ([], "cpu", False, True, "the inputs of retriever are padded"),
        ([], "cpu", True, False, "no int8 dot products"),
        (["retriever.precision=bf16"], "cpu", True, True, "retriever.precision is bf16"),
    ],
)
def test_a_run_that_cannot_encode_in_int8_is_refused_before_any_work(
    words: list[str],
    device: str,
    packs: bool,
    vnni: bool,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dense, "has_int8_products", lambda: vnni)
    tiny, model = ROOT / "configs" / "tiny.yaml", SimpleNamespace(packs=packs)
    retriever: Any = model
    asked = load_config(tiny, ["index.encode_int8=true", *words])
    with pytest.raises(ConfigError, match=f"index.encode_int8 is true, but .*{told}"):
        require_int8(asked, "retriever", retriever, torch.device(device))
    require_int8(load_config(tiny, words), "retriever", retriever, torch.device(device))
    monkeypatch.setattr(dense, "has_int8_products", lambda: True)
    fitting: Any = SimpleNamespace(packs=True)
    require_int8(load_config(tiny, ["index.encode_int8=true"]), "retriever", fitting, torch.device("cpu"))
