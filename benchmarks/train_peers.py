"""What `benchmarks/train.py` compares with: a loop in the shape of the paper's released code, sentence-transformers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.cross_encoder.losses import ListNetLoss
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from sentence_transformers.util import batch_to_device, dot_score
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification

from benchmarks.train_recipe import Recipe
from engine import losses
from engine.config.timetable import Visit
from engine.data.batches import Group
from engine.models.loading import load_tokenizer
from engine.objectives.game import retriever_loss

CERTAIN = 100.0
"""A label whose softmax among zeros is 1."""
_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")


class _Loop:
    """A plain loop: subclasses accumulate the gradient of a step."""

    name = ""

    def __init__(self, recipe: Recipe, module: nn.Module, *, fused: bool) -> None:
        self._recipe, self.module = recipe, module.to(recipe.run.device)
        self._device = recipe.run.device
        self._tokenizer = load_tokenizer(str(recipe.folders["retriever"]))
        self._optimizer = torch.optim.AdamW(self.module.parameters(), weight_decay=0.0, fused=fused)
        self.collating = 0.0

    def take(self, visit: Visit) -> None:
        self.collating = 0.0
        self.module.train()
        for step in range(visit.first_step, visit.first_step + visit.phase.steps):
            self._step(visit, step, visit.phase.schedule.lr(step))

    def check(self, visit: Visit) -> tuple[float, float]:
        self.module.eval()
        loss, norm = self._step(visit, visit.first_step, 0.0)
        return loss, float(norm)

    def _step(self, visit: Visit, step: int, lr: float) -> tuple[float, Tensor]:
        samples = self._recipe.samples(visit)
        groups = samples.share(samples.groups(step))
        loss = self._accumulate(visit, groups)
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), visit.phase.optim.max_grad_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss, norm

    def _accumulate(self, visit: Visit, groups: Sequence[Group]) -> float:
        raise NotImplementedError

    def _autocast(self) -> AbstractContextManager[Any]:
        half = self._recipe.section("retriever").precision == "bf16"
        return torch.autocast(self._device.type, torch.bfloat16) if half else nullcontext()

    @contextmanager
    def _collation(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.collating += time.perf_counter() - start


class Plain(_Loop):
    """A loop in the shape of the paper's released code: all padded to full length, activations recomputed."""

    name = "plain loop in the shape of AR2's code"

    def __init__(self, recipe: Recipe, visit: Visit) -> None:
        folder = recipe.folders[visit.phase.model]
        dropout = recipe.section(visit.phase.model).dropout
        options = {} if dropout is None else dict.fromkeys(_DROPOUTS, dropout)
        auto_class: Any = AutoModel if visit.phase.model == "retriever" else AutoModelForSequenceClassification
        module = auto_class.from_pretrained(folder, dtype=torch.float32, **options)
        if visit.phase.model == "retriever":
            module.pooler = None
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        super().__init__(recipe, module, fused=False)
        self._opponent: Any = None
        if visit.phase.opponent:
            ranker = AutoModelForSequenceClassification.from_pretrained(recipe.folders["ranker"], dtype=torch.float32)
            self._opponent = ranker.to(self._device).eval().requires_grad_(False)

    def _accumulate(self, visit: Visit, groups: Sequence[Group]) -> float:
        # In-batch negatives need the whole batch at once; recomputation makes room for it.
        size = len(groups) if visit.phase.pool != "none" else visit.phase.micro_batch_size
        total = 0.0
        for start in range(0, len(groups), size):
            chunk = groups[start : start + size]
            with self._autocast():
                loss = self._loss(visit, chunk) * (len(chunk) / len(groups))
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        return total

    def _loss(self, visit: Visit, groups: Sequence[Group]) -> Tensor:
        documents = [text for group in groups for text in self._recipe.texts(group)]
        queries = [self._recipe.query(group) for group in groups]
        size = len(documents) // len(groups)
        repeated = [query for query in queries for _ in range(size)]
        if visit.phase.model == "ranker":
            return losses.ranker_cross_entropy(self._scores(self.module, repeated, documents).view(len(groups), -1))
        config = self._recipe.run.config
        queries_BD = self._embed(queries, config.query_max_length)
        documents_ND = self._embed(documents, config.retriever.max_length)
        if visit.phase.pool != "none":
            targets_B = torch.arange(len(groups), device=self._device) * size
            return losses.contrastive(queries_BD @ documents_ND.T, targets_B, score_scale=config.retriever.score_scale)
        with torch.no_grad():
            ranker_BN = self._scores(self._opponent, repeated, documents).view(len(groups), -1)
        retriever_BN = torch.einsum("bd,bnd->bn", queries_BD, documents_ND.view(len(groups), size, -1))
        return retriever_loss(config.ar2, retriever_BN, ranker_BN, config.retriever.score_scale)[0]

    def _embed(self, texts: list[str], max_length: int) -> Tensor:
        batch = self._tokens(texts, max_length=max_length, truncation=True)
        states_NLH = self.module(**batch).last_hidden_state.float()
        mask_NL1: Tensor = batch["attention_mask"].unsqueeze(-1)
        embeddings_ND: Tensor = (states_NLH * mask_NL1).sum(1) / mask_NL1.sum(1)
        return embeddings_ND

    def _scores(self, ranker: Any, queries: list[str], documents: list[str]) -> Tensor:
        max_length = self._recipe.run.config.ranker.max_length
        batch = self._tokens(queries, documents, max_length=max_length, truncation="only_second")
        scores_N: Tensor = ranker(**batch).logits.squeeze(-1).float()
        return scores_N

    def _tokens(self, *texts: list[str], **options: Any) -> Any:
        with self._collation():
            return self._tokenizer(*texts, padding="max_length", return_tensors="pt", **options).to(self._device)


class PeerRetriever(_Loop):
    """sentence-transformers: in-batch negatives with a gradient cache."""

    name = "sentence-transformers, CachedMultipleNegativesRankingLoss"

    def __init__(self, recipe: Recipe, visit: Visit) -> None:
        section = recipe.section("retriever")
        settings = {} if section.dropout is None else dict.fromkeys(_DROPOUTS, section.dropout)
        backbone = Transformer(
            str(recipe.folders["retriever"]), max_seq_length=section.max_length, config_kwargs=settings
        )
        pooling = Pooling(backbone.get_embedding_dimension(), "mean")
        model = SentenceTransformer(modules=[backbone, pooling], device=str(recipe.run.device))
        super().__init__(recipe, model, fused=True)
        options: Any = {"mini_batch_size": visit.phase.micro_batch_size, "scale": section.score_scale}
        self._loss: Any = CachedMultipleNegativesRankingLoss(model, similarity_fct=dot_score, **options)

    def _accumulate(self, _visit: Visit, groups: Sequence[Group]) -> float:
        with self._collation():
            columns = zip(*([self._recipe.query(group), *self._recipe.texts(group)] for group in groups), strict=True)
            model: Any = self.module
            features = [batch_to_device(model.preprocess(list(column)), self._device) for column in columns]
        with self._autocast():
            loss = self._loss(features, None)
            loss.backward()  # the texts are embedded once more in it, in the same type
        return float(loss.detach())


class PeerRanker(_Loop):
    """sentence-transformers: a cross-encoder with a listwise loss."""

    name = "sentence-transformers, ListNetLoss"

    def __init__(self, recipe: Recipe, visit: Visit) -> None:
        model: Any = cross_encoder(recipe, dropout=recipe.section("ranker").dropout)
        super().__init__(recipe, model, fused=True)
        preprocess = model.preprocess

        def timed(*words: Any, **options: Any) -> Any:
            with self._collation():
                return preprocess(*words, **options)

        model.preprocess = timed  # its loss calls it
        pairs = visit.phase.micro_batch_size * (1 + visit.phase.num_negatives)
        self._loss: Any = ListNetLoss(self.module, mini_batch_size=pairs)  # type: ignore[arg-type]

    def _accumulate(self, visit: Visit, groups: Sequence[Group]) -> float:
        total, size = 0.0, visit.phase.micro_batch_size
        for start in range(0, len(groups), size):
            chunk = groups[start : start + size]
            texts = [self._recipe.texts(group) for group in chunk]
            labels = [torch.tensor([CERTAIN, *[0.0] * (len(one) - 1)], device=self._device) for one in texts]
            with self._autocast():
                loss = self._loss([[self._recipe.query(group) for group in chunk], texts], labels)
            loss = loss * (len(chunk) / len(groups))
            loss.backward()
            total += float(loss.detach())
        return total


def cross_encoder(recipe: Recipe, *, dropout: float | None = None, dtype: torch.dtype = torch.float32) -> CrossEncoder:
    """Load the ranker's weights as sentence-transformers' cross-encoder, its logits taken raw."""
    model: CrossEncoder = CrossEncoder(
        str(recipe.folders["ranker"]),
        num_labels=1,
        max_length=recipe.run.config.ranker.max_length,
        device=str(recipe.run.device),
        activation_fn=nn.Identity(),
        model_kwargs={"dtype": dtype},
        config_kwargs={} if dropout is None else dict.fromkeys(_DROPOUTS, dropout),
    )
    return model
