"""Recipe files: optimizer, schedule and batch in one YAML or JSON."""
