"""Embeddings on the disks of the hosts that made them: `store` keeps them, `deal` says who has which."""
