"""Engines: token ids in, token ids and log-probs out. They know nothing of protocols or retrievers."""
