"""What a training will take, before it starts.

fit            what fits, what is refused
run_size       a run as far as its size goes
memory         bytes of a rank
throughput     time
out_of_memory  what to change where it took more all the same
"""
