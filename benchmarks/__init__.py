"""Benchmarks: one script per claim; see README.md for what to run."""
