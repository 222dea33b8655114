"""Text to measure and train on: sources, rows, conversations.

sources        bundled, files, folders, the Hub, what a caller has
streams        sources, tokenised and drawn by weight
bundled        what bundled ones hold
default_text   what is read where nobody names text
general_text   text that comes with Python and its packages
packing        rows of one length
image_rows     rows of an image, a question and its answer
chat           conversations
contamination  evaluation items in training text
repetition     whether a text ends in one
"""
