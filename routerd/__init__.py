"""routerd."""
