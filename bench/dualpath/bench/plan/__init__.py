"""What two paths would give a cluster: `dualpath plan`."""
