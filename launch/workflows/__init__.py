"""What takes several stages.

preflight  what is refused before a stage begins
pipeline   all in order
dry_run    what all in order would do, how long, how much disk
search     several plans, cut, healed, scored and ranked
"""
