"""Several runs side by side.

compare     side by side
comparable  which may stand in one table
standings   of models, by column and in the mean
page        for readers and scripts
figure      what is kept against costs
"""
