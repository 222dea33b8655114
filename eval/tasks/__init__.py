"""What is asked, by name.

load       by name: ours, the user's, lm-eval's
names      which names there are, without importing anything
data_sets  what tasks are made of, as described
documents  its rows, from the Hub, a folder or a generator, and what each asks
protocols  one data set under every protocol
"""
