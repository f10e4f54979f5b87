"""`dualpath demo`: one measured answer to whether the second path adds its bandwidth."""
