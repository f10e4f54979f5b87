"""Every order of events of a small load, as far as one likes: the protocol of loads and relays."""
