"""What parts that change layers of a model share.

student   writes student/ and plan.json, proven by running it
between   layers calculated from their neighbours: means, and what LESA predicts
swapping  layers of a donor in the places of a model's own
zeroing   attention, MLP and heads that write nothing for good
"""
