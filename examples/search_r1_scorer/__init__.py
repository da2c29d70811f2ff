"""The published scorers of Search-R1, bug by bug."""
