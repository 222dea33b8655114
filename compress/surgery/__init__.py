"""The student in memory and on disk, proven to be the teacher without the dropped layers.

teacher           a checkpoint by its configuration and headers
cut_model         in memory
config_cut        its configuration
narrow_config     that of narrower layers
copying           by copying its tensors under new names, new numbers in places of some
shards            by copying stored bytes
stored_names      which tensors those are
quantised         settings that name layers
proof             that the result is right
"""
