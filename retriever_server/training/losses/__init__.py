"""Losses of our own: one a file. A class or function here whose first parameter is `model` is one."""
