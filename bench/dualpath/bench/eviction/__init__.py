"""Hit rates of the store's eviction policies on request traces, beside the offline optimum."""
