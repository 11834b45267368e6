"""The ranker D: a cross-encoder that reads query and document together and gives one score (AR2 Eq. 4).

Shapes: N query-document pairs, L tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification

from engine.config.models import Head
from engine.models.architecture import Attention, input_form, recorded_attention
from engine.models.head import (
    compute_head_in_float32,
    has_trained_classifier,
    head_parameters,
    show_first_tokens,
    without_pooler,
)
from engine.models.loading import load_backbone, own_weights, save_backbone, under_prefix
from engine.models.packed import Pooling, Scorer, classifier_can_be_packed, score_batch
from engine.models.pooled_score import PooledScore, fresh_head, save_pooled, trained_head
from engine.models.source import local_source, read_metadata, saved_metadata, write_metadata
from engine.models.start import RankerStart, read_ranker, require_head_form, transformers_of
from engine.models.template import Batch, Collator, InputTemplate
from engine.models.yes_no import YesNoScore, load_yes_no

_OWN_FORMS = (PooledScore, YesNoScore)
"""Heads that transformers' own classifiers do not have."""


class Ranker(nn.Module):
    """A cross-encoder with one logit, taken raw.

    The paper's w . E([q, d]) has two forms here. A classifier of transformers has its own head: for BERT, a linear
    layer on the pooled (dense and tanh) CLS state. AR2's released code puts its linear layer on the raw CLS state,
    without pooler and without segment ids; that is a `PooledScore`. Weights of one form are never mapped onto the
    other. Heads compute in float32 also where the weights are bfloat16.

    Args:
        classifier: A Hugging Face model for sequence classification with `num_labels` 1, a `PooledScore`, or a
            `YesNoScore`.
    """

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.classifier = classifier
        if not isinstance(classifier, _OWN_FORMS):
            compute_head_in_float32(classifier)
            show_first_tokens(classifier)
        self.form = input_form(classifier)
        """Which inputs the classifier takes."""
        self.packs = classifier_can_be_packed(classifier)
        """Whether `forward` takes packed batches."""
        self.has_fresh_head = False
        """Whether its head was made of random numbers, since what it was loaded from has none."""
        self.compiles = False
        """Whether its scorers compile their layers."""

    @property
    def head(self) -> Head:
        """The form of its head."""
        form: Head = self.classifier.form if isinstance(self.classifier, _OWN_FORMS) else "pooler"
        return form

    @property
    def backbone(self) -> Any:
        """The model of transformers: with its head where that is transformers' own."""
        return self.classifier.backbone if isinstance(self.classifier, _OWN_FORMS) else self.classifier

    @property
    def head_names(self) -> set[str]:
        """Names of the parameters above the layers: the head's, and those of a pooler that belongs to it.

        None where a language model answers, whose last layer is no head of its own.
        """
        if isinstance(self.classifier, YesNoScore):
            return set()
        return {f"classifier.{name}" for name in head_parameters(self.classifier)}

    @classmethod
    def load(
        cls,
        name: str,
        *,
        head: Head | None = None,
        answers: tuple[str, str] | None = None,
        num_layers: int | Sequence[int] | None = None,
        dropout: float | None = None,
        attention: Attention | None = "sdpa",
        gradient_checkpointing: bool = False,
        seed: int = 0,
        section: str = "ranker",
    ) -> Ranker:
        """Load a ranker from pre-trained weights, with or without a head, or one that `save` wrote.

        Args:
            name: Hub id, local folder or `package:NAME`.
            head: Form of its head; None for that of the trained head there is, or else transformers' own.
            answers: The words of the head `yes_no`; None for those of the start, or yes and no.
            num_layers: How many of the first layers to keep, or which, counted from 0; None keeps all.
            dropout: Every dropout, in [0, 1); None keeps the model's own.
            attention: Attention kernel; None for the model's own choice.
            gradient_checkpointing: Recompute activations in the backward pass.
            seed: Initialises a head that the checkpoint lacks, equally on every rank. The global random state is left
                as it was.
            section: The recipe's section, for remedies.

        Returns:
            The ranker in float32, in evaluation mode.

        Raises:
            ModelError: The model cannot be loaded, has a head with more than one logit, or a trained head of another
                form.
        """
        source = local_source(name)
        start = read_ranker(source)
        form: Head = head or start.form or "pooler"
        require_head_form(start, form, name, section)
        common: dict[str, Any] = {
            "folder": transformers_of(source)[0].transformer,
            "num_layers": num_layers,
            "dropout": dropout,
            "attention": attention,
            "gradient_checkpointing": gradient_checkpointing,
            "section": section,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if form == "yes_no":
                words = answers or start.answers or ("yes", "no")
                return cls(load_yes_no(name, words, section, common)).eval()
            if form != "pooler":
                ranker = cls(_load_pooled(name, form, start, seed, common))
                ranker.has_fresh_head = start.layer is None
                return ranker.eval()
            has_head = saved_metadata(source).get("model") == "ranker"
            fresh: list[str] = []
            classifier = load_backbone(
                AutoModelForSequenceClassification,
                name,
                settings={"num_labels": 1},
                may_be_fresh=(lambda _model: ()) if has_head else head_parameters,
                note_fresh=fresh.extend,
                **common,
            )
        ranker = cls(classifier)
        ranker.has_fresh_head = bool(fresh)
        return ranker.eval()

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
        """Write a folder, in place; whoever calls publishes it: a Hugging Face folder, or as `save_pooled` has it.

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
        if isinstance(self.classifier, PooledScore):
            save_pooled(self.classifier, folder, tokenizer, own)
        elif isinstance(self.classifier, YesNoScore):
            save_backbone(self.classifier.backbone, folder, tokenizer, under_prefix(own, "backbone."))
        else:
            save_backbone(self.classifier, folder, tokenizer, own)
        told = {"answers": [*self.classifier.answers.words]} if isinstance(self.classifier, YesNoScore) else {}
        write_metadata(folder, {**(metadata or {}), "model": "ranker", "head": self.head, **told})


def _load_pooled(name: str, form: Pooling, start: RankerStart, seed: int, common: Mapping[str, Any]) -> PooledScore:
    """Load a backbone with a linear layer on its token states, a trained one where there is one."""

    def refuse_classifier(backbone: Any, unused: Collection[str]) -> None:
        if has_trained_classifier(backbone, unused):
            require_head_form(RankerStart("pooler"), form, name, common["section"])

    backbone = load_backbone(AutoModel, name, may_be_fresh=head_parameters, judge_unused=refuse_classifier, **common)
    if start.layer is None:
        head = fresh_head(backbone.config, seed)
    else:
        head = trained_head(Path(local_source(name)), start.layer, backbone.config)
    return PooledScore(without_pooler(backbone), form, head)
