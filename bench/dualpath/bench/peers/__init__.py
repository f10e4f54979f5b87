"""`dualpath bench peers`: other KV stores and this one, the same work on the same machine."""
