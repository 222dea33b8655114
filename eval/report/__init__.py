"""One page about a run.

report      report.html, report.md, figures
page        as HTML
document    blocks, whatever they look like
findings    what a run directory holds
headline    the first sentences
forms       what the form of the questions adds
cautions    what speaks against the numbers
sections    what the model can do
details     how it was done
flips       items that changed sides
speed       speed and size
wording     how numbers are written
score_rows  the table for programs
"""
