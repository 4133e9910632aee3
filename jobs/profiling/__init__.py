"""How fast each stage of a run is, and which one limits it."""
