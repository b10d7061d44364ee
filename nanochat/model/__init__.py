"""The transformer: layers, attention kernels, loss.

Rooms, in reading order: gpt, layers, mlp, table_rows, attention, sdpa_attention, attention_backends,
decode_cache, kv_cache, decode_step, loss, fp8, kernels, loss_kernel, table_kernel, mlp_kernels, fp8_kernels,
gradient_kernel. The last five hold Triton kernels, on the devices that kernels.py says. Attention variants
have a room each, named by ATTENTION_KINDS in config/model_config.py.
Doors: gpt, kv_cache, decode_step, attention_backends, loss.
"""
