"""Parts that change layers of a run's model.

student  writes student/ and plan.json, proven by running it
merge    neighbours into one
swap     a donor's layers
"""
