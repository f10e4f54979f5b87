"""How many requests a second the scheduler decides, and how long one fetch takes."""
