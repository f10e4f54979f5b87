"""A small cluster on one machine: nodes, shaped links, work, meters. For demo and benchmarks."""
