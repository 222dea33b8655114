"""Pages about one run: its report, and the model card that goes to the Hub.

report    report.html, report.md, figures
card      the model card, its license
hub       the push
run       what a run directory holds
findings  what may be concluded from it
headline  the first sentences and the board
cautions  what speaks against the numbers
tables    what the models can do
costs     what they cost
wording   how numbers are written
page      templates, HTML and Markdown
"""
