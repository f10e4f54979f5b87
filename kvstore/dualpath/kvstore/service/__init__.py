"""The storage daemon: the store of one node behind gRPC and the data plane."""
