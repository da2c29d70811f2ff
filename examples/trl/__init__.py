"""Sleuth's rollouts and rewards inside TRL's GRPOTrainer."""
