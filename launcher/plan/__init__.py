"""What a recipe will take on given machines: memory, disk, network, time; from formulas, without running it."""
