"""Qdrant as a retriever."""
