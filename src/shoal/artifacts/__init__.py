"""What a stage hands on: typed JSON with provenance.

artifact       typed JSON with provenance, and its tables
identity       which result is meant, and whether it is there
importance     what layers are worth: scores, the tables of a sweep, the atlas
plan           which layers go, and what stays within those that are narrowed
training       how a student was trained
schemas        JSON schemas of the files, made from their types
evaluation     scores and speed of models, roles of models
"""
