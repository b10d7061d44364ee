"""The training loop, and what happens around its steps.

Rooms, in reading order: run, hooks, step_metrics, run_log, wandb_log, memory, profiling, small_text.
Doors: run, small_text.
"""
