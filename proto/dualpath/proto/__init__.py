"""Protocol of DualPath: versioned gRPC messages and the error mapping."""
