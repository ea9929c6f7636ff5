"""Save and load a training state, whatever the engine and the number of ranks."""
