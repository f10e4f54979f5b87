"""The scheduler of a cluster: which engines a request gets, and which side reads its hits."""
