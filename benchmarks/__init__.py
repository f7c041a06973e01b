"""Benchmarks of memory and accuracy, one command each."""
