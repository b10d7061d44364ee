"""Muon, SOAP and AdamW, sharded over the ranks.

Rooms, in reading order: muon_adamw, rates, muon, adamw, soap, loss_scale.
Doors: muon_adamw, rates, loss_scale.
"""
