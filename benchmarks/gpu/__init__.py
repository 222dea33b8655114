"""`make gpu`.

run           the command: cases, each in a process of its own
cases         what is measured
work          how a case is measured
trl_trainers  TRL's trainers on given rows
table         what was found, for a reader
"""
