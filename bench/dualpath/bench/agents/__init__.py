"""What agents ask for: turns, trajectories, and when each agent arrives."""
