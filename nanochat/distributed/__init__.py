"""Several processes as one run: ranks, collectives, the watchdog, and the comparison of their weights.

Rooms, in reading order: interfaces, world, collectives, watchdog, weight_check.
Doors: world, collectives, watchdog, weight_check.
"""
