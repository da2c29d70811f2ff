"""Builders of models: one retriever method a file. A function here whose first parameter is `base` is one."""
