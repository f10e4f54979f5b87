"""An event-driven simulator of prefill and decode clusters at the level of flows."""
