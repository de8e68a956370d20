"""Ways to decide on a plan."""
