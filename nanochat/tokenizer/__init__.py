"""Text to ids and back, and how well a vocabulary compresses.

Rooms, in reading order: tokenizer, compression.
Doors: tokenizer, compression.
"""
