from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.models.batch import PackedBatch, pack
from engine.models.loading import load_tokenizer
from engine.models.template import Collator, InputTemplate, count_tokens


@pytest.fixture(scope="module")
def template(random_model: Path) -> InputTemplate:
    return InputTemplate.from_tokenizer(load_tokenizer(str(random_model)))


def test_inputs_lie_end_to_end_by_length() -> None:
    batch = pack([[7, 8, 9], [4], [5, 6, 7], [3, 2]], [[0, 0, 1], [0], [1, 1, 1], [0, 1]], first_position=2)
    assert batch.input_ids.tolist() == [[4, 3, 2, 7, 8, 9, 5, 6, 7]]
    assert batch.token_type_ids is not None
    assert batch.token_type_ids.tolist() == [[0, 0, 1, 0, 0, 1, 1, 1, 1]]
    assert batch.position_ids.tolist() == [[2, 2, 3, 2, 3, 4, 2, 3, 4]]
    assert batch.bounds_N.tolist() == [0, 1, 3, 6, 9]
    assert batch.places_N.tolist() == [2, 0, 3, 1]
    assert batch.first_N.tolist() == [3, 0, 6, 1]
    assert batch.runs == ((1, 1), (1, 2), (2, 3))
    assert (batch.longest, batch.num_inputs, batch.num_tokens) == (3, 4, 9)
    assert batch.bounds_N.dtype == torch.int32
    assert {batch.input_ids.dtype, batch.position_ids.dtype, batch.token_type_ids.dtype} == {torch.int64}


@pytest.mark.parametrize("dtype", [np.uint32, np.int64, None])
def test_ids_may_be_arrays_or_lists(dtype: type | None) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 90, length) for length in rng.integers(1, 30, 20)]
    found = pack([row.tolist() if dtype is None else row.astype(dtype) for row in rows], None, 0)
    assert found.token_type_ids is None
    bounds = found.bounds_N.tolist()
    for place, row in zip(found.places_N.tolist(), rows, strict=True):
        assert found.input_ids[0, bounds[place] : bounds[place + 1]].tolist() == row.tolist()
        assert found.position_ids[0, bounds[place] : bounds[place + 1]].tolist() == list(range(len(row)))
    assert sum(count * length for count, length in found.runs) == found.num_tokens
    assert [length for _, length in found.runs] == sorted({len(row) for row in rows})


@pytest.mark.parametrize("with_types", [True, False])
def test_a_batch_moves_as_a_whole(with_types: bool) -> None:
    moved = pack([[5, 6], [7]], [[0, 1], [0]] if with_types else None, 0).to("meta", non_blocking=True)
    tensors = {name: value for name, value in _fields(moved).items() if isinstance(value, torch.Tensor)}
    assert len(tensors) == 4 + with_types
    assert {tensor.device.type for tensor in tensors.values()} == {"meta"}
    assert (moved.runs, moved.longest) == (((1, 1), (1, 2)), 2)


def test_pinning_reaches_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[int] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(id(self)) or self.clone())
    batch = pack([[5, 6], [7]], [[0, 1], [0]], 0)
    assert torch.equal(batch.pin_memory().input_ids, batch.input_ids)
    tensors = [value for value in _fields(batch).values() if isinstance(value, torch.Tensor)]
    assert sorted(pinned) == sorted(map(id, tensors))


def _fields(batch: PackedBatch) -> dict[str, object]:
    return {one.name: getattr(batch, one.name) for one in dataclasses.fields(batch)}


@pytest.mark.parametrize("room", [40, 13, 8])
def test_arrays_and_lists_give_the_same_inputs(template: InputTemplate, room: int) -> None:
    rng = np.random.default_rng(0)
    for num_query, num_document in ((3, 20), (0, 5), (9, 0), (30, 30)):
        query, document = rng.integers(5, 50, num_query), rng.integers(5, 50, num_document).astype(np.uint32)
        for arrays, lists in (
            (template.pair(query, document, room), template.pair(query.tolist(), document.tolist(), room)),
            (template.pair(query.tolist(), document, room), template.pair(query.tolist(), document.tolist(), room)),
            (template.single(document, room), template.single(document.tolist(), room)),
        ):
            assert isinstance(arrays.ids, np.ndarray)
            assert isinstance(lists.ids, list)
            assert [one.tolist() for one in arrays] == [list(one) for one in lists]  # type: ignore[union-attr]


def test_a_collator_makes_the_form_that_its_model_takes(template: InputTemplate) -> None:
    inputs = [template.single(np.arange(5, 5 + length), 32) for length in (4, 9, 1)]
    packed, padded = Collator(template, True, 0)(inputs), Collator(template, False, 0)(inputs)
    assert isinstance(packed, PackedBatch)
    assert isinstance(padded, dict)
    assert count_tokens(packed, padded) == 2 * (4 + 9 + 1 + 3 * template.num_special_single)
    assert torch.equal(padded["input_ids"][0, :6], packed.input_ids[0, 3:9])
    assert padded["input_ids"].shape == (3, 16)
    without = dataclasses.replace(template, has_type_ids=False)
    assert Collator(without, True, 0)(inputs).token_type_ids is None  # type: ignore[union-attr]
    assert "token_type_ids" not in Collator(without, False, 0)(inputs)
