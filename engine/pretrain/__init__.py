"""Pre-training on the corpus alone, before any query is seen: what a retriever or a ranker may start from.

    edmlm           the algorithm: bottleneck pre-training with a masked encoder and decoder
    cocondenser     the algorithm: masked spans under a Condenser's head, and the contrast of two spans of a document
    ict             the algorithm: the inverse cloze task, by which a dual encoder finds where a sentence came from
    phases          the verbs that they name
    documents       which documents a step takes, which are held out, and masked inputs of them
    masking, spans, cloze
                    what is drawn of a document: masked tokens, two masked spans, a sentence that is its query
    reconstruction, condensing, contrast
                    what a step of each computes, in the order of the algorithms
    held_out, condensed, found
                    what each measures on documents that no step has seen, in the same order
    measurements    the record of that

A further objective is a module beside these that names its phases, with its section in `engine.config.pretrain` and,
where its model has another form, a kind of its own in `engine.models`. It shares what is not its own: documents come
from `documents.CorpusSamples`, whose steps go through `engine.training.loop` as all others do, and a contrast over the
batch of all ranks is cached by `engine.training.gradient_cache`.
"""
