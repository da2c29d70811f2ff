"""Models that a user names: where their files lie, adapters, and weights divided over processes."""
