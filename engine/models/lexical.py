"""The lexical retriever: a sparse vector of weights for the words of a vocabulary (SPLADE-max).

A masked language model gives each token of a text a logit for each word v of its vocabulary. The word's weight is

    w_v = max over the text's tokens t of log(1 + relu(logit_tv)),

and the score of query and document is the inner product of their weights, which an inverted index computes. The special
tokens' positions take part in the maximum, as in SPLADE's code and in sentence-transformers.

The function is increasing, so the maximum is taken of the logits, and the logarithm of N rows in place of T. A position
that is not the text's, be it padding or, in a packed batch, another text's, is not looked at: nothing that it holds can
win.

Shapes: B queries, N documents of a query or in all, L tokens of an input, T of all inputs, V words of the vocabulary.

Source: Formal et al. 2021, "SPLADE v2" (arXiv 2109.10086), the model with max pooling (SPLADE-max).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM

from engine.errors import ModelError
from engine.models.architecture import Attention, recorded_attention
from engine.models.batch import PackedBatch
from engine.models.dual import DOCUMENT, QUERY, SHARED, DualEncoder
from engine.models.loading import load_backbone
from engine.models.packed import PackedEncoder, packed_encoder, packed_forward, require_packing
from engine.models.source import local_source, read_metadata, write_metadata
from engine.models.start import read_lexical
from engine.models.template import Batch

LOGIT_BYTES = 2**30
"""What the logits of one forward without gradients take at most."""


class Lexical(DualEncoder):
    """A lexical retriever on one masked language model for both sides (tied), or on one for each.

    Memory: the logits are T V numbers of the model's type, so a training micro-batch of T tokens holds them once in
    the forward, as T V bytes times 2 (bf16) or 4 (fp32), lets them go when their maxima are taken, and has their
    gradient, as large, twice at a moment of the backward. With a vocabulary of 30,522 and bf16 that is 0.5 GiB for
    4,096 tokens, twice; what is kept from forward to backward are N V indices. Passes without gradients cut a batch
    so that the logits take `LOGIT_BYTES` at most.

    Args:
        towers: Models for masked language modelling by tower name: `shared`, or `query` and `document`.
        prompts: What its texts begin with, by side; kept for whoever builds its inputs, and saved with it.
    """

    @classmethod
    def load(
        cls,
        name: str,
        *,
        tied: bool = True,
        prompts: Mapping[str, str] | None = None,
        num_layers: int | Sequence[int] | None = None,
        dropout: float | None = None,
        attention: Attention | None = "sdpa",
        gradient_checkpointing: bool = False,
        section: str = "lexical",
    ) -> Lexical:
        """Load a lexical retriever from a masked language model, a SparseEncoder's folder, or what `save` wrote.

        Args:
            name: Hub id, local folder or `package:NAME`.
            tied: One tower for both sides; False copies a single one into two.
            prompts: What texts begin with, by side; None for what the start says.
            num_layers: How many of the first layers to keep, or which, counted from 0; None keeps all.
            dropout: Every dropout, in [0, 1); None keeps the model's own.
            attention: Attention kernel; None for the model's own choice.
            gradient_checkpointing: Recompute activations in the backward pass.
            section: The recipe's section, for remedies.

        Returns:
            The model in float32, in evaluation mode.

        Raises:
            ModelError: The model cannot be loaded, has no head for masked language modelling, or has two towers where
                one was asked for.
        """
        start = read_lexical(local_source(name))
        if tied and not start.tied:
            raise ModelError(
                f"{name} holds a lexical retriever with two towers",
                expected="one tower",
                remedy=f"set {section}.tied to false",
            )

        def tower(folder: str) -> Any:
            return load_backbone(
                AutoModelForMaskedLM,
                name,
                folder=folder,
                num_layers=num_layers,
                dropout=dropout,
                attention=attention,
                gradient_checkpointing=gradient_checkpointing,
                needs_head=True,
                section=section,
            )

        if start.tied:
            own = tower(start.document.transformer)
            towers = {SHARED: own} if tied else {QUERY: own, DOCUMENT: copy.deepcopy(own)}
        else:
            towers = {QUERY: tower(start.query.transformer), DOCUMENT: tower(start.document.transformer)}
        return cls(towers, prompts=start.prompts if prompts is None else prompts).eval()

    @classmethod
    def open(cls, folder: Path) -> Lexical:
        """Load what `save` wrote, with the towers and the attention it was saved with.

        Raises:
            ArtifactError: The folder has no description, or a damaged one.
            ModelError: The folder holds no lexical retriever.
        """
        saved = read_metadata(folder, "lexical")
        return cls.load(str(folder), tied=saved["tied"], attention=recorded_attention(folder))

    @property
    def dimension(self) -> int:
        """V, the words of the vocabulary; a vector has a weight for each."""
        size: int = self._tower(DOCUMENT).config.vocab_size
        return size

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
        self._save_towers(folder, tokenizer, state_dict)
        prompts = {"prompts": self.prompts} if self.prompts else {}
        write_metadata(folder, {**(metadata or {}), "model": "lexical", "tied": self.tied, **prompts})

    def _packed(self, side: str) -> PackedEncoder | None:
        tower = self._tower(side)
        return packed_encoder(
            tower,
            pooling=weigh_packed,
            normalize=False,
            compiles=self.compiles,
            tokens_at_once=self._tokens_at_once(tower),
        )

    def _encode(self, side: str, inputs: Batch) -> Tensor:
        tower, inputs = self._tower(side), self.form.accepted(inputs)
        if isinstance(inputs, PackedBatch):
            require_packing(self.packs, tower)
            return weigh_packed(packed_forward(tower, inputs).logits[0], inputs)
        rows, length = inputs["input_ids"].shape
        # In training all ranks call a tower equally often, whatever their inputs' lengths: under ZeRO-3 they must.
        at_once = rows if self.training else max(1, self._tokens_at_once(tower) // length)
        parts = [
            {name: tensor[start : start + at_once] for name, tensor in inputs.items()}
            for start in range(0, rows, at_once)
        ]
        return torch.cat([weigh(tower(**part).logits, part["attention_mask"]) for part in parts])

    def _tokens_at_once(self, tower: Any) -> int:
        bytes_of_token: int = self.dimension * tower.dtype.itemsize
        return max(1, LOGIT_BYTES // bytes_of_token)


def weigh(logits_NLV: Tensor, mask_NL: Tensor) -> Tensor:
    """Make each input's weights of words of its tokens' logits, in float32 or a wider type.

    Args:
        logits_NLV: In any floating type [N, L, V]; padded positions may hold anything, NaN and infinity included.
        mask_NL: 1 at tokens, 0 at padding.

    Returns:
        Weights [N, V], 0 where no token has a positive logit of the word.

    Source: arXiv 2109.10086, SPLADE-max. Its code multiplies by the mask, with which a NaN would get through.
    """
    return _weights(_highest(logits_NLV.masked_fill(~mask_NL.bool().unsqueeze(-1), -torch.inf)))


def weigh_packed(logits_TV: Tensor, batch: PackedBatch) -> Tensor:
    """Make each input's weights of words of its tokens' logits, in float32 or a wider type.

    Args:
        logits_TV: Of the row's tokens, in any floating type [T, V].
        batch: Where the inputs lie in it.

    Returns:
        Weights [N, V], in the order in which the inputs were given.
    """
    # Neighbours of equal length are one block; a split has one gradient, where slices would have one each of T rows.
    blocks = torch.split(logits_TV, [inputs * length for inputs, length in batch.runs])
    highest = [
        _highest(block.view(inputs, length, -1)) for block, (inputs, length) in zip(blocks, batch.runs, strict=True)
    ]
    return _weights(torch.cat(highest).index_select(0, batch.places_N))


def _highest(logits_NLV: Tensor) -> Tensor:
    # The faster `amax` would keep the logits for its gradient; this keeps the winners' places.
    return logits_NLV.max(1).values if torch.is_grad_enabled() and logits_NLV.requires_grad else logits_NLV.amax(1)


def _weights(highest_NV: Tensor) -> Tensor:
    return highest_NV.to(torch.promote_types(torch.float32, highest_NV.dtype)).relu().log1p()
