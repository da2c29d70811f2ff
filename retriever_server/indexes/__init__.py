"""Indexes behind the `Retriever` interface: a file for each kind, and what they share."""
