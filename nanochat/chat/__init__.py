"""Chat: conversations, their data, supervised finetuning, tools, evaluation and reinforcement learning.

Rooms, in reading order: conversation, tools, replies, made, sources, corpus, token_cache, packing, loader,
finetune, sft, tasks, evaluate, rollouts, rl, sandbox, terminal.
Doors: conversation, corpus, evaluate, finetune, replies, rl, sft, terminal, tools.
"""
