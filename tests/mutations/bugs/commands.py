"""Seeded bugs of minipali/commands/."""

BUGS = [
]
