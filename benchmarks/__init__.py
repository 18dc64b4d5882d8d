"""Timings beside what a user would use instead: `python -m benchmarks SUBJECT OUTPUT`."""
