"""The folder of a run: its files, its status and the environment of its starts."""
