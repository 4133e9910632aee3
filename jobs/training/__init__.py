"""The training loop, the DeepSpeed engine and the run log."""
