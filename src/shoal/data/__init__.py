"""Text to measure and train on: sources, rows, conversations.

sources        sources, tokenised and drawn by weight
bundled        what bundled ones hold
general_text   text that comes with Python and its packages
in_memory      data sets that a caller has
packing        rows of one length
image_rows     rows of an image, a question and its answer
chat           conversations
contamination  evaluation items in training text
repetition     whether a text ends in one
"""
