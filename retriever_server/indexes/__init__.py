"""Indexes behind the `Retriever` interface; each file wraps one library."""
