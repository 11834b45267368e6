"""Learning: models, losses, phases, index and evaluation; knows no host names, schedulers or data-set names."""
