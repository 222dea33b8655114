"""The model card and the Hub.

card  the model card, its license
hub   the push
"""
