"""Intervals and paired tests.

intervals  in closed form
paired     intervals, paired tests, retention
means      of shares kept, over tasks
"""
