"""What models share that read queries and documents by themselves, so that documents are encoded once.

Such a model has one tower for both sides (tied) or one for each. What a tower is, and what is made of its output, is a
subclass's matter: one embedding (`engine.models.retriever`) or a weight for each word (`engine.models.lexical`).

Shapes: B queries, N documents of a query or in all, L tokens, D numbers of a text.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from engine.models.architecture import input_form
from engine.models.loading import own_weights, save_backbone, under_prefix
from engine.models.packed import PackedEncoder, tower_can_be_packed
from engine.models.template import Batch, Collator, InputTemplate

PaddedEncoder = Callable[[dict[str, Tensor]], Tensor]
"""Maps a padded batch (`input_ids` [N, L], ...) to vectors [N, D]."""
QUERY, DOCUMENT, SHARED = "query", "document", "shared"
"""Names of the towers; a tied model has only the shared one."""


class DualEncoder(nn.Module, abc.ABC):
    """A model with one tower for both sides (tied) or one for each.

    Args:
        towers: Models of transformers by tower name: `shared`, or `query` and `document`.
        prompts: What its texts begin with, by side; kept for whoever builds its inputs, and saved with it.
    """

    def __init__(self, towers: Mapping[str, nn.Module], *, prompts: Mapping[str, str] | None = None) -> None:
        super().__init__()
        # A shared tower is registered once: wrappers that walk the modules would otherwise handle it twice.
        self.towers = nn.ModuleDict(dict(towers))
        self.prompts = dict(prompts or {})
        self.form = input_form(self._tower(DOCUMENT))
        """Which inputs the towers take."""
        self.packs = all(tower_can_be_packed(tower) for tower in self.towers.values())
        """Whether `forward` takes packed batches."""
        self.compiles = False
        """Whether its encoders compile their layers."""

    @property
    def tied(self) -> bool:
        """Whether queries and documents share a tower."""
        return SHARED in self.towers

    @property
    @abc.abstractmethod
    def dimension(self) -> int:
        """D, the numbers of a text."""

    @property
    def longest_input(self) -> int | None:
        """Tokens that the model's positions allow; None where its configuration does not say."""
        return self.form.longest

    def collator(self, template: InputTemplate) -> Collator:
        """Return what makes batches of queries or documents in the form that this model computes fastest.

        Args:
            template: Of the model's tokenizer.
        """
        return Collator(template, self.packs, self.form.first_position)

    def forward(
        self, queries: Batch | None = None, documents: Batch | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Encode queries, documents or both in one call: under ZeRO-3 a forward is a collective.

        Args:
            queries: Padded or packed inputs of B queries, such as `collator` makes; None to leave them out.
            documents: Padded or packed inputs of N documents; None to leave them out.

        Returns:
            Query vectors [B, D] and document vectors [N, D] in float32, None for what was left out.

        Raises:
            ModelError: It is given packed inputs, and takes none (`packs`).

        Source: AR2 Eq. 1 and 4, E(q) and E(d).
        """
        return (
            None if queries is None else self.encode_queries(queries),
            None if documents is None else self.encode_documents(documents),
        )

    def encode_queries(self, inputs: Batch) -> Tensor:
        """Encode padded or packed queries as float32 [B, D]."""
        return self._encode(QUERY, inputs)

    def encode_documents(self, inputs: Batch) -> Tensor:
        """Encode padded or packed documents as float32 [N, D]."""
        return self._encode(DOCUMENT, inputs)

    def query_encoder(self) -> PackedEncoder | PaddedEncoder:
        """Return what encodes queries fastest with the present weights, for inference only.

        Returns:
            As `document_encoder` does.
        """
        return self._packed(QUERY) or self.encode_queries

    def document_encoder(self) -> PackedEncoder | PaddedEncoder:
        """Return what encodes documents fastest with the present weights, for inference only.

        Returns:
            An encoder of inputs of any length, without padding, where the tower allows it; else `encode_documents`,
            which takes padded batches. Both give the same vectors up to rounding.
        """
        return self._packed(DOCUMENT) or self.encode_documents

    @abc.abstractmethod
    def save(
        self,
        folder: Path,
        tokenizer: Any,
        state_dict: Mapping[str, Tensor] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Write Hugging Face folders: `folder` itself where tied, else `folder/query` and `folder/document`."""

    @abc.abstractmethod
    def _packed(self, side: str) -> PackedEncoder | None: ...

    @abc.abstractmethod
    def _encode(self, side: str, inputs: Batch) -> Tensor: ...

    def _tower(self, side: str) -> Any:
        return self.towers[SHARED if self.tied else side]

    def _save_towers(
        self, folder: Path, tokenizer: Any, state_dict: Mapping[str, Tensor] | None
    ) -> Mapping[str, Tensor]:
        """Write each tower's folder; return the weights that were written, all of this module's."""
        weights = own_weights(self) if state_dict is None else state_dict
        for name, tower in self.towers.items():
            target = folder if name == SHARED else folder / name
            save_backbone(tower, target, tokenizer, under_prefix(weights, f"towers.{name}."))
        return weights
