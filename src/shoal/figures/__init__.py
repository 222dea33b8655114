"""Drawings of results, as SVG.

run_figures  layers, training, before and after
atlas        sweeps
depth        the stack of layers
diagnostics  depth diagnostics and probes
levels       score against level
pareto       what is kept against what it costs
"""
