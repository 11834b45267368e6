"""Retrievers: whatever answers a query with documents of the corpus, behind the protocol of `engine.search`."""
