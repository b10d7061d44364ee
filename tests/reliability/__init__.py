"""Promises with figures: what is measured is written when a test ends (`figures.py`)."""
