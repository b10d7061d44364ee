"""Bits per byte, samples and CORE of a trained model, and of one of Hugging Face.

Rooms, in reading order: base_eval, bits_per_byte, hf_model, score_files, core.
Doors: base_eval, bits_per_byte, score_files.
"""
