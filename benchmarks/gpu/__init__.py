"""`make gpu`.

run    the command: cases, each in a process of its own
cases  what is measured
work   how a case is measured
table  what was found, for a reader
"""
