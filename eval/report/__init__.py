"""One page about a run.

report          report.html, report.md, figures
page            as HTML
document        blocks, whatever they look like
findings        what a run directory holds
headline        the first sentences
cautions        what speaks against the numbers
sections        what the model can do
details         how it was done
flips           items that changed sides
speed_section   speed and size
speed_ratio     how many times as fast, with its range
search_section  what a search found
search_table    its table
wording         how numbers are written
score_rows      the table for programs
"""
