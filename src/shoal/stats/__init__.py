"""Intervals and paired tests.

intervals  in closed form
bootstrap  by bootstrap, for many variants at once
paired     intervals, paired tests, retention
"""
