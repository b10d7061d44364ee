"""Bits per byte, samples and CORE of a trained model, and of one of Hugging Face; scores of chat tasks.

Rooms, in reading order: base_eval, bits_per_byte, hf_model, score_files, chat_scores, core.
Doors: base_eval, bits_per_byte, chat_scores, score_files.
"""
