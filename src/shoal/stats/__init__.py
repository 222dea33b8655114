"""Intervals and paired tests.

intervals  in closed form, and by bootstrap for many variants at once
paired     intervals, paired tests, retention
"""
