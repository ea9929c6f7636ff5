"""Smith's learning rate range test: raise the lr until the loss diverges, and restore everything."""
