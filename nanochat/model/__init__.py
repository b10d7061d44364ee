"""The transformer: layers, attention kernels, loss.

Rooms, in reading order: gpt, layers, mlp, table_rows, attention, sdpa_attention, attention_backends, loss,
fp8; kernels, and the Triton kernels of loss, tables, MLP, fp8 and gradients: loss_kernel, table_kernel,
mlp_kernels, fp8_kernels, gradient_kernel. Attention variants have a room each, named by ATTENTION_KINDS in
config/model_config.py.
Doors: gpt, attention_backends, loss.
"""
