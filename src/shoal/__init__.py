"""shoal makes large language models shallower and gets their abilities back.

The map of the house. The floor (this folder) imports no room:

    errors      what a user can fix, and how it is said
    recipe      what a run is: every setting a frozen dataclass; load_recipe()
    strict_yaml YAML 1.2 scalars, no key twice
    artifact    what a stage hands on: typed JSON with provenance
    models      load and save causal language models; where their decoder layers live
    checkpoint  checkpoint folders as files: whole or damaged, and what identifies them
    cost        what a model takes to keep and to run, told from its configuration
    demo        the bundled demo model, converted once
    data        text sources, tokenised and packed
    abilities   seeded items for retrieval, knowledge and reasoning, and how written answers are matched
    suites      sets of evaluation tasks by name, with their cost
    runtime     ranks, logging, seeding, environment stamp
    figures     the pictures that stages and report share
    cli         `shoal measure | prune | distill | eval | report | run`

The rooms stand at the top of the repository:

    compress    measure layer importance, choose layers, cut
    train       distil the cut model back
    eval        retrieval, knowledge and reasoning before and after; the report; the Hub

Data flows one way, all in one run directory:
importance.json -> plan.json -> student/ -> distilled/ -> eval/*.json -> report.html
"""

__version__ = "0.1.0"
