"""Reports, reconstructions, model cards and progress displays."""
