"""The asynchronous search client, what goes over the wire, and the servers behind a URL."""
