"""How the retrievers are trained: examples and mining, model builders, recipes over sentence-transformers."""
