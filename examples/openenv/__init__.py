"""The search environment as an OpenEnv server."""
