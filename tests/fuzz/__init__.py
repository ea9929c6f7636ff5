"""Fuzz tests: each input ends in an error of ours, or does what it says.

``python -m tests.fuzz --inputs 10000 --seed 0`` for all of it; ``tests/unit/test_fuzz.py`` for a part.
"""
