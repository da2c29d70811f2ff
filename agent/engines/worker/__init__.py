"""Code that vLLM loads in its own environment; nothing of ours imports it."""
