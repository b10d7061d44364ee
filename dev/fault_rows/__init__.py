"""Rows of dev/faults.py, a module a subject."""
