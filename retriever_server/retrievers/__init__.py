"""Retrievers over other retrievers: fusion, shards, caches, reranking, remote servers, baselines."""
