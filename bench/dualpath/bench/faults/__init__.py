"""Random faults on the real processes of a small cluster; see `command.py`."""
