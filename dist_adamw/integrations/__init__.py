"""One file per library that dist_adamw works inside of. Floor 4; each imports its library lazily."""
