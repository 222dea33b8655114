"""Drawings of results, as SVG.

style     colours, text, panels, files
layers    what layers are worth, the stack
atlas     sweeps
training  curves of a training
scores    before and after, by level
"""
