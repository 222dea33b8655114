"""What parts that look at attention share.

calls    what attention is computed from, seen while the model runs
prompts  look-ups and needles whose answer stands in the text, and their counterparts
"""
