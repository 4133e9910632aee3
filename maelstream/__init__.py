"""MAE pre-training at line rate: shards -> pipeline -> model, and the jobs over them (docs/design.md)."""
