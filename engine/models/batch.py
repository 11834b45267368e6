"""A batch without padding: inputs laid end to end in one row.

A padded batch computes every input at the length of its longest neighbour. A packed batch is one row of all tokens
whose positions start anew at each input: linear layers, normalisations and activations see real tokens only, and
attention, the one operation in which tokens meet, stays within each input (`engine.models.attention`).

Inputs lie in the row by length, shortest first, so that those of equal length are neighbours and attend in one call.
The batch remembers where each of them went: what a model computes from it comes out in the given order.

Shapes: N inputs, T tokens of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

TokenIds = Sequence[int] | npt.NDArray[np.integer]
_Copy = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """Inputs laid end to end in one row, shortest first.

    Attributes:
        input_ids: int64 [1, T].
        position_ids: int64 [1, T], counted anew in each input.
        token_type_ids: int64 [1, T]; None for a model that takes none.
        bounds_N: int32 [N + 1]: where each input of the row starts, and T.
        places_N: int64 [N]: which input of the row each given one is.
        runs: (inputs, tokens of each) of neighbours of equal length.
        longest: Tokens of the longest input.
    """

    input_ids: Tensor
    position_ids: Tensor
    token_type_ids: Tensor | None
    bounds_N: Tensor
    places_N: Tensor
    runs: tuple[tuple[int, int], ...]
    longest: int

    @property
    def num_inputs(self) -> int:
        """N."""
        return len(self.places_N)

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.input_ids.shape[1]

    @property
    def first_N(self) -> Tensor:
        """Where the first token of each given input lies in the row, int32 [N]."""
        return self.bounds_N.index_select(0, self.places_N)

    @property
    def last_N(self) -> Tensor:
        """Where the last token of each given input lies in the row, int32 [N]."""
        return self.bounds_N.index_select(0, self.places_N + 1) - 1

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """Copy the tensors to a device.

        Args:
            device: Where to.
            non_blocking: Do not wait for the copies, which only those from pinned memory allow.
        """
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """Copy the tensors to memory from which a GPU fetches them while the host goes on."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, copy: _Copy) -> PackedBatch:
        return replace(
            self,
            input_ids=copy(self.input_ids),
            position_ids=copy(self.position_ids),
            token_type_ids=None if self.token_type_ids is None else copy(self.token_type_ids),
            bounds_N=copy(self.bounds_N),
            places_N=copy(self.places_N),
        )


def pack(ids: Sequence[TokenIds], type_ids: Sequence[TokenIds] | None, first_position: int) -> PackedBatch:
    """Lay inputs end to end.

    Args:
        ids: Token ids of each input, special tokens included; at least one input, each of at least one token.
        type_ids: Segment of each token, as long as `ids`; None for a model that takes none.
        first_position: Position of an input's first token (`engine.models.architecture.InputForm`).

    Returns:
        The batch on the CPU.
    """
    lengths_N = np.fromiter(map(len, ids), np.int64, len(ids))
    order_N = np.argsort(lengths_N, kind="stable")
    places_N = np.empty_like(order_N)
    places_N[order_N] = np.arange(len(ids))
    lengths_N = lengths_N[order_N]
    bounds_N = np.zeros(len(ids) + 1, np.int32)
    np.cumsum(lengths_N, out=bounds_N[1:])
    order = order_N.tolist()
    # A token's place in the row, less the start of its input.
    positions_T = np.arange(first_position, first_position + bounds_N[-1])
    positions_T -= np.repeat(bounds_N[:-1], lengths_N)
    lengths, counts = np.unique(lengths_N, return_counts=True)
    return PackedBatch(
        input_ids=_row(ids, order),
        position_ids=torch.from_numpy(positions_T)[None],
        token_type_ids=None if type_ids is None else _row(type_ids, order),
        bounds_N=torch.from_numpy(bounds_N),
        places_N=torch.from_numpy(places_N),
        runs=tuple(zip(counts.tolist(), lengths.tolist(), strict=True)),
        longest=int(lengths[-1]),
    )


def _row(values: Sequence[TokenIds], order: Sequence[int]) -> Tensor:
    row_T = np.concatenate([values[place] for place in order], dtype=np.int64)
    return torch.from_numpy(row_T)[None]
