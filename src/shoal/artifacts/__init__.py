"""What a stage hands on: typed JSON with provenance.

artifact       typed JSON with provenance
identity       which result is meant, and whether it is there
importance     what layers are worth: scores, the tables of a sweep, the atlas
plan           which layers go
training       how a student was trained
evaluation     scores of a model, roles of models
speed          how fast they are
tables         results as tables: pandas, notebooks
width          what stays within layers that are narrowed
"""
