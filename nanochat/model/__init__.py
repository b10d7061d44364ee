"""The transformer: layers, attention kernels, loss.

Rooms, in reading order: gpt, layers, attention, sdpa_attention, differential_attention, attention_backends,
loss, fp8.
Doors: gpt, attention_backends, loss.
"""
