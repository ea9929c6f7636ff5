"""Communication between ranks, and checks that they agree."""
