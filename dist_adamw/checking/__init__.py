"""Check a recipe, an Accelerate config and a DeepSpeed JSON together, before anything starts."""
