"""Training: the step, the loop of steps, and the hooks, metrics and memory around them.

Rooms, in reading order: run, stage, hooks, step_metrics, run_log, wandb_log, memory, profiling, small_text.
Doors: run, small_text, stage, hooks, run_log.
"""
