"""Inputs that nobody meant to write: each ends in a sentence of ours, or does what it says.

``python -m tests.fuzz --inputs 10000 --seed 0`` for all of it; ``tests/unit/test_fuzz.py`` for a part.
"""
