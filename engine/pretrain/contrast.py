"""What one step of the inverse cloze task computes: each pseudo query's document among those of the whole batch.

Shapes: B queries of this rank, P documents of the pool.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.models.template import Batch
from engine.objectives.contrast import PoolContrast
from engine.pretrain.cloze import ClozeBuilder
from engine.pretrain.documents import Reading, ReadingSamples


class ClozeContrast(PoolContrast[Reading]):
    """The contrast of a batch of pseudo queries (Lee et al. 2019, section 4; as AR2 Eq. 2 without hard negatives).

    A document that is in the batch twice, since an epoch ends and the next begins there, is no negative of itself.

    Args:
        samples: Documents.
        builder: Makes pseudo queries of them.
        score_scale: By which scores are multiplied.
    """

    def __init__(self, samples: ReadingSamples, builder: ClozeBuilder, *, score_scale: float) -> None:
        super().__init__(samples, (builder.num_tokens,), score_scale=score_scale)
        self._builder = builder

    def inputs(self, groups: Sequence[Reading]) -> dict[str, Batch]:
        """Draw pseudo queries, and join them and their documents."""
        return self._builder(groups, self.samples.visit.phase.name)

    def excluded(self, own: Sequence[Reading], pool: Sequence[Reading]) -> Tensor:
        """Mark a query's own document wherever it is."""
        own_B, pool_P = (np.array([one.document for one in readings]) for readings in (own, pool))
        return torch.from_numpy(own_B[:, None] == pool_P[None, :])
