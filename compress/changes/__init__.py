"""Changes of layers that stay, each with the same four methods.

change        what every change knows of itself: sizes, tensors, how it is put in force, words
calibration   text and model that a change is decided on
compensation  what makes up for dropped layers without training
fit           one gap after the other, on the student's own states, by sums over tokens
fold          factors and maps in the weights of a layer, proven by running it
width         fewer channels and key-value groups, those that write most
narrowing     what becomes smaller where layers are narrowed
"""
