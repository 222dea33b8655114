"""Training text that a model writes.

writing    by the teacher, before training
filtering  what of it is kept
on_policy  by the student, in the middle of training
loops      what of that teaches nothing
sampling   token by token
"""
