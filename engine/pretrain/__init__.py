"""Pre-training on the corpus alone, before any query is seen: what a retriever or a ranker may start from.

    edmlm           the algorithm: bottleneck pre-training with a masked encoder and decoder
    ict             the algorithm: the inverse cloze task, by which a dual encoder finds where a sentence came from
    masking         which tokens of a document are masked
    cloze           which sentence of a document is its query
    documents       which documents a step takes, which are held out, and masked inputs of them
    reconstruction  what a step of edmlm computes
    contrast        what a step of ict computes
    held_out        what encoder and decoder lose on documents that no step has seen
    found           how well a retriever finds documents that no step has seen
    measurements    the record of either

A further objective is a module beside `edmlm` and `ict` that names its phases, with its section in
`engine.config.pretrain` and, where its model has another form, a kind of its own in `engine.models`. It shares what is
not its own: documents come from `documents.CorpusSamples`, whose steps go through `engine.training.loop` as all others
do. One is foreseen: coCondenser adds the contrast of two spans of a document to a masked encoder whose head reads its
first state with the states of an earlier layer. `masking` and the bottleneck model's shape serve it, the spans are
drawn as `cloze` draws sentences, and its batch is cached by `engine.training.gradient_cache`.
"""
