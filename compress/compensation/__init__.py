"""Make up for dropped layers without training: what they did is folded into the weights of layers that stay.

sums    the regression at one gap, from sums over tokens
fold    factors and maps in the weights of a layer, proven by running it
source  where the layers' weights are: in memory, or in files, one layer at a time
fit     one gap after the other, on the student's own states
check   what shows before anything is measured
size    memory and disk that this takes
"""
