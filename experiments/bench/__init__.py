"""Benchmarks: one file each, found by name; ``python -m experiments.bench NAME`` runs one."""
