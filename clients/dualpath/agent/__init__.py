"""The agent of a node: owns loads, relays for peers."""
