"""What a training will take, before it starts.

memory      bytes of a rank
throughput  time
fit         what fits, what is refused, what to change where it took more all the same
estimate    all of it for a reader
"""
