"""What runs on the nodes: agent, coordinator, worker, trainer, data, checkpoints, metrics."""
