"""Trackers: what metrics.jsonl says, shown in TensorBoard or MLflow while the run goes on."""
