"""From a batch of trajectories to better weights: packing, log-probabilities, updates, processes."""
