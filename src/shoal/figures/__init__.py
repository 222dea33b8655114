"""Drawings of results, as SVG.

style          colours, text, panels, files
importance     layers and runs of layers
scores         before and after
training       curves of a training
atlas          sweeps
depth          the stack of layers
depth_use      what models use their layers for
diagnostics    depth diagnostics and probes
heads          retrieval heads and patching
levels         score against level
pareto         what is kept against what it costs
vision_states  states of a vision tower
frontier       what cuts would keep against the size and speed they leave
"""
