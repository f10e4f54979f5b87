"""`dualpath demo-model`: a real model's KV through the store and back, by two paths."""
