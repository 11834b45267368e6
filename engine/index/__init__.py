"""The index over document embeddings: planned, trained, filled by all ranks, merged, tuned, searched."""
