"""Trajectories in, better weights out."""

from data.moved import find_moved_modules

find_moved_modules()
