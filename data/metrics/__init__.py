"""Scores of answers against gold answers, calibration, and intervals of them."""
