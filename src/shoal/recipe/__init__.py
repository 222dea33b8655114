"""What a run is told: every setting a frozen dataclass.

recipe          every setting a frozen dataclass; load_recipe()
yaml            YAML 1.2 scalars, no key twice
section         what its sections are made of
edits           `prune.edits`: what is done to layers besides dropping them
distill         `distill`
losses          `distill.losses`
lora            `distill.lora`
on_policy       `distill.on_policy`
writing         `distill.writing`
recording       `record`
search          `search`, and what a search finds
suites          `eval.suite`: tasks by name, with their cost
deepspeed_file  `distill.deepspeed`
"""
