"""Evaluation: rankings of every system, their measures, and the tables made of them."""
