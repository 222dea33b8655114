"""Narrow the layers that stay: fewer MLP channels and key-value groups, as many in each.

narrowing  which tensors get smaller, and where these lie in the files
measure    which channels and groups stay, by what they write
"""
