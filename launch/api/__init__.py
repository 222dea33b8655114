"""What `import shoal` offers for models in memory; loaded when a name of it is first used.

compressing  what layers are worth, which go, and the model without them
training     distillation of the pruned model from its teacher
evaluating   scores of a model, and what changed between two
running      a whole recipe, and what goes to the Hub
settings     types of further arguments, written from the recipe's sections
"""
