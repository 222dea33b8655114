"""Variants scored on tasks, and what follows from it.

sweep          variants scored on lm-eval tasks
table          units by columns, with intervals and tests
atlas          what follows from single-layer removals
agreement      how far columns rank alike
columns        scores by name
placeholder    what will be measured, without its scores: choices that nothing can make possible
expected_loss  what a plan is expected to cost on tasks
items          scores of every item, on disk
"""
