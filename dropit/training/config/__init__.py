"""The config: its keys, how a file and the command line set them, and the checks of their values."""
