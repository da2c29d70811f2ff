"""Plug-ins and small programs that only some users need; each is tested as the rest is."""
