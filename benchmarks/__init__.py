"""What this package costs, measured side by side in one process; each module is run by `python -m`."""
