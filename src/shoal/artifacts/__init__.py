"""What a stage hands on: typed JSON with provenance.

artifact    typed JSON with provenance
importance  the tables of a sweep, the atlas
tables      results as tables: pandas, notebooks
width       what stays within layers that are narrowed
depth       diagnostics and probes
draft       what a teacher accepts of a draft's tokens
heads       retrieval heads and patching
search      plans, and how they rank before and after they were healed
shares      how training sources share the tokens
"""
