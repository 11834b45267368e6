"""Data that is made, not downloaded: docstrings of installed packages, and a small generated set."""
