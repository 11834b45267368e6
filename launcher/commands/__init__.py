"""The commands beside training: each module is one of them."""
