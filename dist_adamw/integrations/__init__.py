"""One package per library that dist_adamw works inside of. Each library is imported where it is used."""
