"""Soak: crashes, power losses, flipped bytes and long mixed load against the store."""
