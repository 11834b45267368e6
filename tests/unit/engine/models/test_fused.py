"""A layer whose weights are laid out anew computes what it computed."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

from engine.models.fused import EpilogueGelu, FusedLinear, JoinedLinear, fuse_linear_layers

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40, "vocab_size": 50}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 3, 1024, 1500])
def test_a_fused_layer_equals_its_parts(bias: bool, tokens: int) -> None:
    torch.manual_seed(0)
    linear, inputs_TI = nn.Linear(24, 40, bias=bias), 3 * torch.randn(1, tokens, 24)
    with torch.inference_mode():
        outputs_TO = linear(inputs_TI)
        torch.testing.assert_close(FusedLinear(linear)(inputs_TI), outputs_TO, atol=1e-5, rtol=1e-5)
        gelu_TO = FusedLinear(linear, gelu=True)(inputs_TI)
        torch.testing.assert_close(gelu_TO, nn.functional.gelu(outputs_TO), atol=1e-5, rtol=1e-5)
        assert float((nn.functional.gelu(outputs_TO, approximate="tanh") - gelu_TO).abs().max()) > 1e-4


def model(activation: str = "gelu") -> transformers.BertModel:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, hidden_act=activation, initializer_range=0.3)
    return transformers.BertModel(config, add_pooling_layer=False).eval()


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_a_model_gives_the_same_states(activation: str) -> None:
    """Only the exact GELU may go into the kernel: its approximations are other functions."""
    plain = model(activation)
    fused = copy.deepcopy(plain)
    assert fuse_linear_layers(fused) == 12
    assert isinstance(fused.encoder.layer[0].intermediate.intermediate_act_fn, nn.Identity) == (activation == "gelu")
    ids_NL = torch.randint(0, 50, (3, 20))
    with torch.inference_mode():
        torch.testing.assert_close(fused(ids_NL)[0], plain(ids_NL)[0], atol=1e-5, rtol=1e-5)


def test_what_the_kernel_does_not_take_stays() -> None:
    half = model().to(torch.bfloat16)
    assert fuse_linear_layers(half) == 0
    assert not any(isinstance(module, FusedLinear) for module in half.modules())
    with torch.device("meta"):
        assert fuse_linear_layers(nn.Linear(2, 3)) == 0


def test_a_subclass_may_compute_something_else() -> None:
    class Doubled(nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(inputs)

    assert fuse_linear_layers(nn.Sequential(Doubled(2, 3), nn.Linear(3, 2))) == 1


@pytest.mark.parametrize("bias", [True, False])
def test_joined_layers_equal_each_alone(bias: bool) -> None:
    layers = [nn.Linear(6, 4, bias=bias) for _ in range(3)]
    parts = JoinedLinear(layers).parts
    first_TI, second_TI = torch.randn(1, 5, 6), torch.randn(1, 2, 6)
    calls = [(0, first_TI), (1, first_TI), (2, first_TI), (0, first_TI)]
    with torch.no_grad():
        # Keys and values of other inputs than the queries', as in attention across sequences.
        for number, inputs in [*calls, (1, second_TI), (2, first_TI)]:
            torch.testing.assert_close(parts[number](inputs), layers[number](inputs))


def test_a_joined_layer_keeps_no_inputs() -> None:
    joined = JoinedLinear([nn.Linear(6, 4) for _ in range(3)])
    inputs_TI = torch.randn(5, 6)
    for part in joined.parts:
        part(inputs_TI)
    assert joined._inputs is None
    assert not joined._waiting


def test_gelu_in_the_product_differs_by_less_than_bfloat16_rounds() -> None:
    linear, inputs_TI = nn.Linear(6, 4), torch.randn(1, 5, 6)
    with torch.no_grad():
        expected_TO = nn.functional.gelu(linear(inputs_TI))
        torch.testing.assert_close(EpilogueGelu(linear)(inputs_TI), expected_TO, atol=1e-3, rtol=1e-3)
