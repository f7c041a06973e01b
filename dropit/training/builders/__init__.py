"""From the config to the parts of a run: each part takes plain arguments."""
