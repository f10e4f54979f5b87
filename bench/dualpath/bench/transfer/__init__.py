"""`dualpath bench transfer`: the transports against memcpy and sockets, by grain."""
