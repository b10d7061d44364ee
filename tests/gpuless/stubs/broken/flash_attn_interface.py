"""FlashAttention 3 built for another version of torch."""

raise ImportError("flash_attn_3/_C.abi3.so: undefined symbol: aoti_torch_zero_")
