"""The RDMA transport and what it is made of. Importing it needs no RDMA hardware and no library."""
