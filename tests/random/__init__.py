"""Random sequences of what users do, against a reference; each prints the shortest script that differs."""
