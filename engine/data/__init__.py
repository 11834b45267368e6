"""What is learnt from: the corpus as tokens, the training queries, their candidates, and the batches of a step."""
