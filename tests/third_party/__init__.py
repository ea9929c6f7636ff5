"""Tests that other projects ship, run with our optimizer and scheduler in place of theirs."""
