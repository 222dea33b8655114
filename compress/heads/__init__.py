"""Which heads copy what is asked for, and through which states the answer reaches the last token.

prompts   look-ups and needles whose answer stands in the text, and twins of them with another answer
scores    how often a head looks at the token that is copied next
patching  states of one twin put into the run of the other
"""
