"""Accelerate: prepare(), sample counting, and save_state()."""
