"""Seeded bugs of minipali/looking/."""

BUGS = [
]
