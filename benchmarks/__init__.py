"""Scripts that measure; each prints its table. Nothing here is part of the engine."""
