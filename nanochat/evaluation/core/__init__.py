"""DCLM CORE: 22 tasks, from their texts to the centered mean.

Rooms, in reading order: evaluate, bundle, download, prompts, prompt_tokens, batching,
scoring, results, statistics, compare.
Doors: evaluate, bundle, download, prompt_tokens, scoring, results, statistics, compare.
"""
