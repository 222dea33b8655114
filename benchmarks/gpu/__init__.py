"""`make gpu`.

run    the command: cases, each in a process of its own, and tables of what was found
cases  what is measured
work   how a case is measured
"""
