"""What the command says of itself and of what it offers; no run directory is read or written.

verbs         the verbs init, list, explain, completion: arguments and text
settings      what a recipe's keys mean, from the dataclasses
explain       `shoal explain`
names         `shoal list`
first_recipe  `shoal init`
completion    `shoal completion`
"""
