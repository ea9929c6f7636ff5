"""Processes: what they exchange, and whether they agree."""
