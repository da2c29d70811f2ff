"""Training data that a language model writes: seeds, queries, candidates, judges, filters, examples."""
