"""The modes of train.py, and what they print."""
