"""Training of retrievers: examples and mining, model builders, losses, recipes over sentence-transformers."""
