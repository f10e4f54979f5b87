"""What a model costs: bytes of KV a token, FLOPs of a prompt, time on a GPU."""
