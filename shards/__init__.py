"""The corpus on disk: formats, tokenised shards, embeddings; knows no model."""
