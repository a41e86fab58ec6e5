"""Full checkpoints."""
