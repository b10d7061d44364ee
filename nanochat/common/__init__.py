"""What all folders use and what knows nothing of models: errors, files, locks, flags, JSON, the machine.

Rooms, in reading order: errors, console, files, typed_json, run_files, locks, checksums, archives,
flags, machine, listener, stop_signals, progress, charts.
Doors: errors, console, files, typed_json, run_files, locks, checksums, archives, flags, machine,
listener, stop_signals, progress, charts.
"""
