"""What the command says of itself and of what it offers; no run directory is read or written.

verbs         the verbs init, list, explain: arguments and text
explain       `shoal explain`
names         `shoal list`
first_recipe  `shoal init`
"""
