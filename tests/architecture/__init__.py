"""The rules of the house that a machine can check; `tests/test_architecture.py` holds the project to them."""
