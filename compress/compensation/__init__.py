"""Make up for dropped layers without training: what they did is folded into the weights of layers that stay.

sums   the regression at one gap, from sums over tokens
fold   factors and maps in the weights of a layer, proven by running it
fit    one gap after the other, on the student's own states
"""
