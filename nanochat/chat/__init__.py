"""Chat: conversations, their data, supervised finetuning, tools, evaluation and reinforcement learning.

Rooms, in reading order: conversation, tools, replies, made, sources, corpus, token_cache, packing, loader,
finetune, sft, tasks, evaluate, rollouts, rl, sandbox, terminal.
Doors: corpus, evaluate, finetune, rl, sft, terminal.
"""
