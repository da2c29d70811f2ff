"""Trajectories in, better weights out."""

from data.objects.moved import find_moved_modules

find_moved_modules()
