"""Training text that a model writes.

writing    by the teacher, before training
filtering  what of it is kept
on_policy  by the student, in the middle of training
loops      what of that teaches nothing
horizon    how long it may be
sampling   token by token
"""
