"""GPU memory: copies against the limit of the bus, checked and timed."""
