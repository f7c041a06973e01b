"""A fuzzer: random networks, trained in random ways, plain and converted, and compared.

``networks.py`` makes a network, ``training.py`` says what is done with it, ``oracle.py`` judges one seed;
``python -m tests.fuzz --first 0 --count 50000 --processes 2`` tries many and prints the seeds that fail.
"""
