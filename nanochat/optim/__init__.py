"""Muon, SOAP and AdamW, sharded over the ranks.

Rooms, in reading order: muon_adamw, reductions, rates, loss_scale. Optimizers of the block matrices have a
room each, named by MATRIX_OPTIMIZERS in config/recipes.py.
Doors: muon_adamw, rates, loss_scale.
"""
