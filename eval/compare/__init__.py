"""Several runs side by side.

compare     side by side
comparable  which may stand in one table
means       over tasks, columns the same
standings   of models, by column
data        for scripts
page        for readers
figure      what is kept against costs
"""
