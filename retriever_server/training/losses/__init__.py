"""Losses of our own: one a file, by name in the table `LOSSES` (`build_components.py`)."""
