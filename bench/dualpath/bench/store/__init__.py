"""`dualpath bench store`: the tiers of the store, each against the limit of the same machine."""
