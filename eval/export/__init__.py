"""The model card and the Hub.

card     the model card
license  under which license
hub      the push
"""
