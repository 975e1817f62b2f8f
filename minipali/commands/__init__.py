"""What can be run: `python -m minipali COMMAND`."""
