"""Text to measure and train on: sources, rows, conversations.

sources        sources, tokenised and drawn by weight
packing        rows of one length
chat           conversations
contamination  evaluation items in training text
repetition     whether a text ends in one
"""
