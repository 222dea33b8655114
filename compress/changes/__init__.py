"""Changes of layers that stay, each with the same four methods.

change        what every change knows of itself: sizes, tensors, how it is put in force, words
table         the changes that a recipe can ask for
calibration   text and model that a change is decided on
compensation  what makes up for dropped layers without training
fit           one gap after the other, on the student's own states
fold          factors and maps in the weights of a layer, proven by running it
sums          the regression at one gap, from sums over tokens
width         fewer channels and key-value heads
narrowing     what becomes smaller where layers are narrowed
units         which channels and key-value groups stay
"""
