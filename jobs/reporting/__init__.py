"""Reports, reconstructions and progress for people."""
