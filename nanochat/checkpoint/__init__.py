"""Checkpoints: their files, the state in them, saving beside training, and what a resume refuses.

Rooms, in reading order: format, compatibility, resume, state, async_saver.
Doors: format, state, async_saver, resume.
"""
