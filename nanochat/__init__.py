"""A GPT-2-class language model, trained end to end. Each folder imports only those before it in this list.

common, config: errors, files, flags; arguments, recipes, the plan that follows from --depth.
distributed, tokenizer: the ranks of a run; text to ids and back.
optim, model, data: Muon and AdamW; the transformer; corpora, shards, packed batches.
checkpoint, engine: the state of a run on the disk; generation with a KV cache.
evaluation: bits per byte, samples, DCLM CORE.
export, report, train: the folder for transformers; report.html; the loop.
chat: conversations, SFT, tools, evaluation, RL.
"""
