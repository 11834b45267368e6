"""The terminal at which a program is started: its words, its streams and their ends."""
