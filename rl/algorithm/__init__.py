"""The algorithm as pure functions in tables: presets, advantages, losses, credit, rewards."""
