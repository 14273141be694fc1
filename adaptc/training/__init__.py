"""Train a program as a module: Trainer, TRL, FSDP2, checkpoints, and schedules of ranks."""
