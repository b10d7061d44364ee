"""Muon, SOAP and AdamW, sharded over the ranks.

Rooms, in reading order: muon_adamw, matrix_rule, adamw, soap, loss_scale.
Doors: muon_adamw, matrix_rule, loss_scale.
"""
