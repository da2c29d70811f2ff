"""Builders of models, by name in the table `BUILDERS` (`build_components.py`)."""
