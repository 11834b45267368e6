"""Pre-training on the corpus alone, before any query is seen: what a retriever or a ranker may start from.

    edmlm           the algorithm: bottleneck pre-training with a masked encoder and decoder
    masking         which tokens of a document are masked
    documents       which documents a step takes, and which are held out
    reconstruction  what a step computes
    held_out        what encoder and decoder lose on documents that no step has seen

A further objective is a module beside `edmlm` that names its phases, with its section in `engine.config.pretrain` and,
where its model has another form, a kind of its own in `engine.models`. It shares what is not its own: documents come
from `documents.DocumentSamples`, whose steps go through `engine.training.loop` as all others do. Two are foreseen:

* the inverse cloze task takes a part of each document as its query: an objective like `engine.objectives`'s contrast
  over a batch, whose groups are made of `DocumentSamples` and of a draw keyed by (seed, step, document);
* coCondenser adds the contrast of two spans of a document to a masked encoder whose head reads its first state with the
  states of an earlier layer: `masking` and the bottleneck model's shape serve it, the spans are drawn as above, and
  its batch is cached by `engine.training.gradient_cache`.
"""
