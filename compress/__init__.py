"""Measure what layers are worth (measure), choose which go (plan), cut them out (surgery)."""
