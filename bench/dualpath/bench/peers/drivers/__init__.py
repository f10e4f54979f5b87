"""Scripts that drive one store each, in an environment in which that store is installed."""
