"""The transformer: layers, attention kernels, loss.

Rooms, in reading order: gpt, layers, attention, sdpa_attention, attention_backends, loss, fp8. Attention
variants have a room each, named by ATTENTION_KINDS in config/model_config.py.
Doors: gpt, attention_backends, loss.
"""
