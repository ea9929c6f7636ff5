"""One file per library that dist_adamw works inside of. Each is imported lazily."""
