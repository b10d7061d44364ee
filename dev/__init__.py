"""Measurements and tools of development; not part of the library."""
