"""The HTTP server: application, micro-batches, middleware, hot swap of indexes."""
