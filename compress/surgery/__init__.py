"""The student in memory and on disk, proven to be the teacher without the dropped layers.

teacher           a checkpoint by its configuration and headers
cut_model         in memory
config_cut        its configuration
narrow_config     that of narrower layers
special_cuts      families with rules of their own
copying           by copying its tensors under new names
shards            by copying stored bytes
changed_tensors   with new numbers in places of stored ones
stored_names      which tensors those are
quantised         settings that name layers
proof             that the result is right
"""
