"""What comes out: checkpoints, logs, tables and pictures."""
