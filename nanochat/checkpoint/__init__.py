"""Checkpoints: their files, the state in them, saving beside training, and what a resume refuses.

Rooms, in reading order: format, state, async_saver, resume, same_run, compatibility.
Doors: format, state, async_saver, resume.
"""
