"""What is seen and changed along the depth of a model.

interventions  skipped layers, erased states
residual_flow  directions and sizes of what is written
runs           runs from any layer on, and what the head makes of every state
"""
