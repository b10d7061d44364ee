"""Configuration, without torch: flags, recipes, model shape, and the plan that follows from one number.

Rooms, in reading order: arguments, model_config, recipes, schedule, plan.
Doors: arguments, recipes, model_config, schedule, plan.
"""
