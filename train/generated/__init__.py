"""Training text that a model writes.

writing    by the teacher, before training, and what of it is kept
on_policy  by the student, in the middle of training, and what of it teaches nothing
sampling   token by token
"""
