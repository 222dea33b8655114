"""Models of another depth or width.

grow   more layers, and how they should start
width  fewer layers, narrower ones, or both
"""
