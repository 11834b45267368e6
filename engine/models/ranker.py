"""The ranker D: a cross-encoder that reads query and document together and gives one score (AR2 Eq. 4).

Shapes: N query-document pairs, L tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from engine.models.architecture import Attention, input_form, recorded_attention
from engine.models.head import compute_head_in_float32, head_parameters, show_first_tokens
from engine.models.loading import load_backbone, own_weights, save_backbone
from engine.models.packed import Scorer, classifier_can_be_packed, score_batch
from engine.models.source import local_source, read_metadata, saved_metadata, write_metadata
from engine.models.start import transformers_of
from engine.models.template import Batch, Collator, InputTemplate


class Ranker(nn.Module):
    """A sequence classifier with one logit, taken raw.

    The paper's w . E([q, d]) is the classifier's own head here: for BERT, a linear layer on the pooled (dense and
    tanh) CLS state. AR2's released code puts its linear layer on the raw CLS state, without pooler and without
    segment ids, so its checkpoints are not this model and are never mapped onto it. With the standard head, what is
    trained here loads in other libraries as it is. The head computes in float32 also where the weights are bfloat16.

    Args:
        classifier: A Hugging Face model for sequence classification with `num_labels` 1.
    """

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.classifier = classifier
        compute_head_in_float32(classifier)
        show_first_tokens(classifier)
        self.form = input_form(classifier)
        """Which inputs the classifier takes."""
        self.packs = classifier_can_be_packed(classifier)
        """Whether `forward` takes packed batches."""
        self.compiles = False
        """Whether its scorers compile their layers."""

    @classmethod
    def load(
        cls,
        name: str,
        *,
        num_layers: int | None = None,
        dropout: float | None = None,
        attention: Attention | None = "sdpa",
        gradient_checkpointing: bool = False,
        seed: int = 0,
        section: str = "ranker",
    ) -> Ranker:
        """Load a ranker from pre-trained weights, with or without a head, or one that `save` wrote.

        Args:
            name: Hub id, local folder or `package:NAME`.
            num_layers: Keep only the first layers; None keeps all.
            dropout: Every dropout, in [0, 1); None keeps the model's own.
            attention: Attention kernel; None for the model's own choice.
            gradient_checkpointing: Recompute activations in the backward pass.
            seed: Initialises a head that the checkpoint lacks, equally on every rank. The global random state is left
                as it was.
            section: The recipe's section, for remedies.

        Returns:
            The ranker in float32, in evaluation mode.

        Raises:
            ModelError: The model cannot be loaded, or has a head with more than one logit.
        """
        source = local_source(name)
        has_head = saved_metadata(source).get("model") == "ranker"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            classifier = load_backbone(
                AutoModelForSequenceClassification,
                name,
                folder=transformers_of(source)[0].transformer,
                num_layers=num_layers,
                dropout=dropout,
                attention=attention,
                gradient_checkpointing=gradient_checkpointing,
                settings={"num_labels": 1},
                may_be_fresh=(lambda _model: ()) if has_head else head_parameters,
                section=section,
            )
        return cls(classifier).eval()

    @classmethod
    def open(cls, folder: Path) -> Ranker:
        """Load what `save` wrote, with the attention it was saved with.

        Raises:
            ArtifactError: The folder has no description, or a damaged one.
            ModelError: The folder holds no ranker.
        """
        read_metadata(folder, "ranker")
        return cls.load(str(folder), attention=recorded_attention(folder))

    @property
    def longest_input(self) -> int | None:
        """Tokens that the model's positions allow; None where its configuration does not say."""
        return self.form.longest

    def collator(self, template: InputTemplate) -> Collator:
        """Return what makes batches of pairs in the form that this model computes fastest.

        Args:
            template: Of the model's tokenizer.
        """
        return Collator(template, self.packs, self.form.first_position)

    def forward(self, pairs: Batch) -> Tensor:
        """Score pairs.

        Args:
            pairs: Padded or packed inputs of N pairs, such as `collator` makes.

        Returns:
            Raw logits [N] in float32.

        Raises:
            ModelError: It is given packed inputs, and takes none (`packs`).

        Source: AR2 Eq. 4, D(q, d) = w . E([q, d]).
        """
        return score_batch(self.classifier, self.form.accepted(pairs), packs=self.packs)

    def scorer(self) -> Scorer:
        """Return what scores pairs fastest with the present weights, for inference only.

        Raises:
            ModelError: The ranker is in training mode.
        """
        return Scorer(self.classifier, packs=self.packs, compiles=self.compiles)

    def save(
        self,
        folder: Path,
        tokenizer: Any,
        state_dict: Mapping[str, Tensor] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a Hugging Face folder, in place; whoever calls publishes it.

        Args:
            folder: Where to; made if needed.
            tokenizer: Saved with the weights.
            state_dict: Full weights by this module's names; None takes the module's own, which must then be whole.
            metadata: Whatever else goes into sparring.json: lengths, template, score_scale.

        Raises:
            ModelError: `state_dict` lacks a weight.
        """
        weights = own_weights(self) if state_dict is None else state_dict
        own = {name.removeprefix("classifier."): weight for name, weight in weights.items()}
        save_backbone(self.classifier, folder, tokenizer, own)
        write_metadata(folder, {**(metadata or {}), "model": "ranker"})
