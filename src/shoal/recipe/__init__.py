"""What a run is told: every setting a frozen dataclass.

recipe             the whole, with `track` and `export`; load_recipe() and overrides
keys               every key by its place, type and docstring; keys as options
messages           why a recipe is refused, in the words of YAML
gone               keys that recipes once knew, and what to write instead
field_words        what users of other tools type, and what it is here
asked              what acts beyond the run directory, and who has to say it, one list
not_together       settings that contradict each other, one table; what else sections must not say
section            what sections are made of; what each key shapes, and identities from it
measure            `measure`, with `measure.sweep`
prune              `prune`
distill            `distill` and `record`
losses             `distill.losses`
trainer_arguments  `distill.trainer` and `distill.deepspeed`
evaluate           `eval`, its suites, and what `measure.sweep` shares with it
remembered         recipe.yaml of a run directory: what it was made with
"""
