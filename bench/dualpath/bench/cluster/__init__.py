"""`dualpath bench cluster`: how near to the limit of its links a shaped cluster comes."""
