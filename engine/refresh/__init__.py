"""Index refresh: encode the corpus, index it, mine fresh candidates."""
