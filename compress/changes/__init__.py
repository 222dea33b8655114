"""Changes of layers that stay: what makes up for dropped ones without training, and fewer channels and heads.

calibration  text and model that a change is decided on
fit          compensation, one gap after the other, on the student's own states
fold         factors and maps in the weights of a layer, proven by running it
sums         the regression at one gap, from sums over tokens
narrowing    what becomes smaller where layers are narrowed
units        which channels and key-value groups stay
"""
