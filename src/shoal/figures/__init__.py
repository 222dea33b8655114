"""Drawings of results, as SVG.

style          colours, text, panels, files
importance     layers and runs of layers
scores         before and after
training       curves of a training
atlas          sweeps
depth          the stack of layers
levels         score against level
pareto         what is kept against what it costs
"""
