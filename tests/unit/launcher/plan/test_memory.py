from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from engine.config.models import ModelConfig
from launcher.plan.activations import Inputs, Numerics, kept_bytes, layer_bytes
from launcher.plan.memory import Buckets, buckets_of, idle_bytes, partition_elements, step_memory
from launcher.plan.models import ModelShape, describe

FP32 = Numerics("fp32", "sdpa", checkpointing=False, on_cpu=True)
BF16_ON_GPU = Numerics("bf16", "sdpa", checkpointing=False, on_cpu=False)
BUCKETS = Buckets(64_000_000, 1)


def settings(layers: int = 2, **changes: float) -> BertConfig:
    return BertConfig(
        **{
            "vocab_size": 100,
            "hidden_size": 64,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "intermediate_size": 256,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            **changes,
        }
    )


def shape(**changes: float) -> ModelShape:
    return describe(settings(**changes), "retriever", name="test")


def bytes_kept_by_autograd(config: BertConfig, rows: int, length: int, dtype: torch.dtype, attention: str) -> int:
    """All storages that the backward pass of a real model would read, its weights left out."""
    config._attn_implementation = attention
    model = BertModel(config, add_pooling_layer=False).to(dtype).train()
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, length // 2 :] = 0
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=torch.randint(0, 100, (rows, length)), attention_mask=mask)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_layer_keeps_what_autograd_keeps(dtype: str, attention: str, dropout: float) -> None:
    """The plan forgot dropout's masks, or the scores of attention that is not fused, and a step ran out of memory."""
    rows, length = 4, 32
    numerics = Numerics(dtype, attention, checkpointing=False, on_cpu=True)
    torch_type = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    changes = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    one, two = (bytes_kept_by_autograd(settings(n, **changes), rows, length, torch_type, attention) for n in (1, 2))
    told = layer_bytes(shape(**changes), Inputs(rows, length), numerics)
    assert told == pytest.approx(two - one, rel=0.02)
    whole = kept_bytes(shape(layers=1, **changes), [Inputs(rows, length)], numerics)
    assert whole == pytest.approx(one, rel=0.1)


def test_checkpointing_keeps_one_layer_and_the_inputs_of_the_others() -> None:
    """Recomputing layers brought nothing in the plan, or brought more than it can."""
    inputs, plain = Inputs(8, 64), shape(layers=12)
    kept = kept_bytes(plain, [inputs], FP32)
    recomputed = kept_bytes(plain, [inputs], replace(FP32, checkpointing=True))
    one_layer, states = layer_bytes(plain, inputs, FP32), 4 * inputs.tokens * plain.hidden
    assert kept - recomputed == 11 * one_layer - 12 * states


def test_queries_and_documents_lie_in_one_graph() -> None:
    inputs = [Inputs(2, 16), Inputs(4, 64)]
    assert kept_bytes(shape(), inputs, FP32) == sum(kept_bytes(shape(), [one], FP32) for one in inputs)


def memory(stage: int, world_size: int, numerics: Numerics = FP32, **settings: int):  # type: ignore[no-untyped-def]
    given = {"num_micro_batches": 2, "buckets": BUCKETS, **settings}
    return step_memory(shape(), [Inputs(4, 32)], numerics, stage=stage, world_size=world_size, **given)  # type: ignore[arg-type]


def test_zero_shares_moments_then_gradients_then_weights() -> None:
    """A stage was planned to save what it does not share."""
    total = shape().parameters
    found = [memory(stage, 4, BF16_ON_GPU) for stage in range(4)]
    assert [one.weights for one in found[:3]] == [2 * total] * 3
    assert found[3].weights == pytest.approx(2 * total / 4, rel=0.01)
    assert found[0].moments == 8 * total
    assert found[1].moments == found[2].moments == pytest.approx(8 * total / 4, rel=0.01)
    assert [one.gradients for one in found[:2]] == [2 * total] * 2
    assert found[2].gradients < total
    assert found[0].masters == 4 * total
    assert found[1].masters == pytest.approx(total, rel=0.01)


def test_fp32_without_zero_has_no_second_copy_of_the_weights() -> None:
    assert memory(0, 1).masters == 0
    assert memory(1, 1).masters == 4 * shape().parameters  # ZeRO's flat master, although the weights are float32 too


def test_more_ranks_never_take_more() -> None:
    for stage in range(1, 4):
        peaks = [memory(stage, ranks).resident for ranks in (1, 2, 4, 8)]
        assert all(later <= earlier for earlier, later in pairwise(peaks))


def test_accumulated_gradients_lie_beside_the_activations() -> None:
    """The second micro-batch ran out of memory although the first had fitted."""
    several, single = memory(1, 2), memory(1, 2, num_micro_batches=1)
    assert several.backward_start - single.backward_start == 4 * shape().parameters


def test_a_gpu_holds_the_whole_bucket_a_cpu_what_is_written() -> None:
    assert memory(1, 2, BF16_ON_GPU).bucket == 2 * BUCKETS.elements
    assert memory(1, 2).bucket == 4 * shape().parameters


def test_a_parameter_on_the_border_counts_on_both_sides() -> None:
    """Half of the parameters were planned for a rank, whose gradients were kept as whole parameters."""
    border = replace(shape(), groups=((60, 100, 40), (10, 10)))
    assert partition_elements(border, 1) == 220
    # Cut at 100: rank 0 has the first and part of the second, rank 1 the other part and the third.
    assert partition_elements(border, 2) == max(60 + 100, 100 + 40) + 10
    assert partition_elements(replace(shape(), groups=((8,),)), 4) == 8


def test_resting_engines_leave_their_masters_without_zero_in_bf16() -> None:
    total = shape().parameters
    assert [idle_bytes(shape(), "bf16", stage) for stage in range(4)] == [4 * total, 0, 0, 0]
    assert idle_bytes(shape(), "fp32", 0) == 0


def test_buckets_come_from_the_file_that_the_recipe_names(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e6, "overlap_comm": True}}))
    section = ModelConfig(name="random", zero_stage=2, deepspeed=path)
    assert buckets_of(section, 2) == Buckets(5_000_000, 2)
    assert buckets_of(section, 1).elements == 64_000_000  # another stage than the file's


def test_parameters_are_grouped_as_the_optimizer_groups_them() -> None:
    """The plan cut partitions of other groups than the engine's."""
    from engine.config.training import OptimConfig
    from engine.training.parameter_groups import parameter_groups

    module = nn.ModuleDict({"encoder": BertModel(settings(), add_pooling_layer=False)})
    groups = parameter_groups(module, OptimConfig())
    assert shape().groups == tuple(tuple(p.numel() for p in group["params"]) for group in groups)
