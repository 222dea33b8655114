"""What the command says of itself and of what it offers; no run directory is read or written.

explain       `shoal explain`
options       keys in `shoal VERB --help`
names         `shoal list`
first_recipe  `shoal init`
"""
