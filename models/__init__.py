"""Networks and their checkpoints; copies of a network."""
