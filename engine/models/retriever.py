"""The retriever G: a dual encoder whose score is an inner product of embeddings (AR2 Eq. 1 and 4).

Shapes: B queries, N documents of a query or in all, L tokens, H hidden size, D embedding dimension: H, or what the last
layer above the pooling gives.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModel

from engine.errors import ModelError
from engine.models.architecture import ENCODERS, Attention, recorded_attention
from engine.models.batch import PackedBatch
from engine.models.dual import DOCUMENT, QUERY, SHARED, DualEncoder
from engine.models.head import head_parameters, without_pooler
from engine.models.loading import load_backbone, under_prefix
from engine.models.packed import (
    PackedEncoder,
    Pooling,
    packed_encoder,
    packed_forward,
    pool_packed,
    require_packing,
)
from engine.models.projection import load_projection, projected_width, save_projection
from engine.models.source import local_source, read_metadata, write_metadata
from engine.models.start import read_retriever
from engine.models.template import Batch

Similarity = Literal["dot", "cosine"]


class Retriever(DualEncoder):
    """A dual encoder with one tower for both sides (tied) or one for each.

    AR2's released code has two towers, CLS pooling and no normalisation; the paper writes one E_theta.

    Args:
        towers: Backbones by tower name: `shared`, or `query` and `document`.
        pooling: What of the last layer is the embedding: the first or the last token, or the mean over the tokens.
        similarity: `cosine` makes embeddings unit vectors, so that their inner product is the cosine.
        projections: Layers above the pooling, by tower name; towers without any are left out.
        prompts: What its texts begin with, by side; kept for whoever builds its inputs, and saved with it.
    """

    def __init__(
        self,
        towers: Mapping[str, nn.Module],
        *,
        pooling: Pooling,
        similarity: Similarity,
        projections: Mapping[str, nn.Module] | None = None,
        prompts: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(towers, prompts=prompts)
        self.projections = nn.ModuleDict(dict(projections or {}))
        self.pooling: Pooling = pooling
        self.similarity: Similarity = similarity

    @classmethod
    def load(
        cls,
        name: str,
        *,
        pooling: Pooling,
        similarity: Similarity,
        tied: bool,
        prompts: Mapping[str, str] | None = None,
        num_layers: int | Sequence[int] | None = None,
        dropout: float | None = None,
        attention: Attention | None = "sdpa",
        gradient_checkpointing: bool = False,
        section: str = "retriever",
    ) -> Retriever:
        """Load a retriever from pre-trained weights, a sentence-transformers folder, or one that `save` wrote.

        Towers and the layers above their pooling are the start's; `engine.models.start` compares the rest.

        Args:
            name: Hub id, local folder or `package:NAME`.
            pooling: `cls` (AR2), `mean`, or `last`, which is a decoder's.
            similarity: `dot` (AR2) or `cosine`.
            tied: One tower for both sides; False copies a single backbone into two.
            prompts: What texts begin with, by side; None for what the start says.
            num_layers: How many of the first layers to keep, or which, counted from 0; None keeps all.
            dropout: Every dropout, in [0, 1); None keeps the model's own.
            attention: Attention kernel; None for the model's own choice.
            gradient_checkpointing: Recompute activations in the backward pass.
            section: The recipe's section, for remedies.

        Returns:
            The retriever in float32, in evaluation mode.

        Raises:
            ModelError: The model cannot be loaded, or has two towers where one was asked for.
        """
        source = local_source(name)
        start = read_retriever(source)
        if tied and not start.tied:
            raise ModelError(
                f"{name} holds a retriever with two towers", expected="one tower", remedy=f"set {section}.tied to false"
            )

        def backbone(folder: str) -> Any:
            model = load_backbone(
                AutoModel,
                name,
                folder=folder,
                num_layers=num_layers,
                dropout=dropout,
                attention=attention,
                gradient_checkpointing=gradient_checkpointing,
                may_be_fresh=head_parameters,  # the pooler, which is not used
                section=section,
            )
            return without_pooler(model)

        if start.tied:
            own = backbone(start.document.transformer)
            towers = {SHARED: own} if tied else {QUERY: own, DOCUMENT: copy.deepcopy(own)}
        else:
            towers = {QUERY: backbone(start.query.transformer), DOCUMENT: backbone(start.document.transformer)}
        projections = {
            tower: load_projection(Path(source), dense, int(towers[tower].config.hidden_size))
            for tower in towers
            if (dense := (start.query if tower == QUERY else start.document).dense)
        }
        told = start.prompts if prompts is None else prompts
        model = cls(towers, pooling=pooling, similarity=similarity, projections=projections, prompts=told)
        return model.eval()

    @classmethod
    def open(cls, folder: Path) -> Retriever:
        """Load what `save` wrote, with the pooling, similarity, towers and attention it was saved with.

        Raises:
            ArtifactError: The folder has no description, or a damaged one.
            ModelError: The folder holds no retriever.
        """
        saved = read_metadata(folder, "retriever")
        return cls.load(
            str(folder),
            pooling=saved["pooling"],
            similarity=saved["similarity"],
            tied=saved["tied"],
            attention=recorded_attention(folder),
        )

    @property
    def dimension(self) -> int:
        """D, the length of an embedding."""
        return projected_width(self._projection(DOCUMENT), int(self._tower(DOCUMENT).config.hidden_size))

    def save(
        self,
        folder: Path,
        tokenizer: Any,
        state_dict: Mapping[str, Tensor] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Write Hugging Face folders: `folder` itself where tied, else `folder/query` and `folder/document`.

        The files are written in place; whoever calls publishes the folder.

        Args:
            folder: Where to; made if needed.
            tokenizer: Saved with the weights.
            state_dict: Full weights by this module's names; None takes the module's own, which must then be whole.
            metadata: Whatever else goes into sparring.json: lengths, template, score_scale.

        Raises:
            ModelError: `state_dict` lacks a weight.
        """
        weights = self._save_towers(folder, tokenizer, state_dict)
        dense = {}
        for name, projection in self.projections.items():
            # Numbered as sentence-transformers numbers modules, of which the first two are transformer and pooling.
            prefix = "" if name == SHARED else f"{name}_"
            dense[name] = [f"{prefix}{number + 2}_Dense" for number, _ in enumerate(projection.children())]
            save_projection(projection, folder, under_prefix(weights, f"projections.{name}."), dense[name])
        description = {"model": "retriever", "pooling": self.pooling, "similarity": self.similarity, "tied": self.tied}
        more = {key: value for key, value in (("dense", dense), ("prompts", self.prompts)) if value}
        write_metadata(folder, {**(metadata or {}), **description, **more})

    def _projection(self, side: str) -> nn.Module | None:
        name = SHARED if self.tied else side
        return self.projections[name] if self.projections and name in self.projections else None

    def _packed(self, side: str) -> PackedEncoder | None:
        return packed_encoder(
            self._tower(side),
            pooling=self.pooling,
            normalize=self.similarity == "cosine",
            projection=self._projection(side),
            compiles=self.compiles,
        )

    def _encode(self, side: str, inputs: Batch) -> Tensor:
        tower, inputs = self._tower(side), self.form.accepted(inputs)
        if isinstance(inputs, PackedBatch):
            require_packing(self.packs, tower)
            states_TH = _states(packed_forward(tower, inputs), tower)[0]
            embeddings_ND = pool_packed(states_TH, inputs, self.pooling)
        else:
            embeddings_ND = pool(_states(tower(**inputs), tower), inputs["attention_mask"], self.pooling)
        projection = self._projection(side)
        if projection is not None:
            embeddings_ND = projection(embeddings_ND)
        return nn.functional.normalize(embeddings_ND, dim=-1) if self.similarity == "cosine" else embeddings_ND


def pool(hidden_NLH: Tensor, mask_NL: Tensor, pooling: Pooling) -> Tensor:
    """Make one embedding of each input's token states, in float32 or a wider type.

    Args:
        hidden_NLH: Last layer [N, L, H] in any floating type; padded positions may hold anything, NaN included.
        mask_NL: 1 at tokens, 0 at padding, which lies behind an input's tokens; for `last` and `mean` also before them.
        pooling: First token, last token, or mean over the tokens.

    Returns:
        Embeddings [N, H].
    """
    dtype = torch.promote_types(torch.float32, hidden_NLH.dtype)
    if pooling == "cls":
        return hidden_NLH[:, 0].to(dtype)
    if pooling == "last":
        places_L = torch.arange(mask_NL.shape[1], device=mask_NL.device)
        places_N = torch.where(mask_NL.bool(), places_L, 0).amax(1)
        return hidden_NLH[torch.arange(len(hidden_NLH), device=hidden_NLH.device), places_N].to(dtype)
    tokens_NL1 = mask_NL.bool().unsqueeze(-1)
    sums_NH = torch.where(tokens_NL1, hidden_NLH.to(dtype), 0.0).sum(1)
    return sums_NH / tokens_NL1.sum(1).clamp(min=1)


def _states(output: Any, tower: Any) -> Tensor:
    states_NLH: Tensor | None = getattr(output, "last_hidden_state", None)
    if states_NLH is None:
        raise ModelError(
            f"{type(tower).__name__} gives no last_hidden_state",
            expected=f"{ENCODERS}, whose token states are an embedding's",
            remedy="name such a model",
        )
    return states_NLH
