"""The making of the embedded world's table."""
