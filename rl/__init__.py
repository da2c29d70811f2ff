"""Trajectories in, better weights out."""
