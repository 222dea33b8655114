"""What takes several stages.

preflight  what is refused before a stage begins
each       a run for every combination of values
pipeline   all in order
dry_run    what all in order would do, how long, how much disk
"""
