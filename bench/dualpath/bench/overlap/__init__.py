"""`dualpath bench overlap`: layers that are computed while the next ones are loaded."""
