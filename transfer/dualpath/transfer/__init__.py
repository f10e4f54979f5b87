"""Moves bytes between processes: regions, transports, links, paths, lanes, placement."""
