"""GPU memory as source and destination of copies. Importing it needs no GPU and no cupy."""
