"""Engine library: `KVClient` and its blocking facade."""
