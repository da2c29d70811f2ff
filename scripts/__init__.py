"""Command lines: parse, wire, call. The only floor that prints."""
