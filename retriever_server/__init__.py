"""Queries in, ranked passages out: the retriever interface, its indexes, the server and its client."""
