"""`dualpath.v1`: generated messages and services; see the .proto files."""
