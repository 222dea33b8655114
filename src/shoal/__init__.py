"""shoal makes large language models shallower and gets their abilities back.

The map of the house. The floor (this folder) imports no room; only the stages and the command lead into the rooms.

What a run is told
    recipe              every setting a frozen dataclass; load_recipe()
    section             what its sections are made of
    strict_yaml         YAML 1.2 scalars, no key twice
    edits               `prune.edits`: what is done to layers besides dropping them
    training            `distill`
    deepspeed_file      `distill.deepspeed`
    terms               `distill.losses`
    lora                `distill.lora`
    on_policy           `distill.on_policy`
    writing             `distill.writing`
    recording           `record`
    search              `search`, and what a search finds
    suites              `eval.suite`: tasks by name, with their cost

Stages: the verbs of the command
    cli                 `shoal measure | prune | record | distill | eval | search | report | run | compare | delta`
    run                 one recipe in its run directory: precision, done, stale, locked
    measuring           measure
    pruning             prune
    distilling          record, distill
    searching           search
    pipeline            eval, report, export, and all in order

What stages hand on
    artifact            typed JSON with provenance
    whole_files         files and folders that are whole or absent
    sweeps              the tables of a sweep, the atlas
    depth               diagnostics and probes

Models
    models              load and save causal language models
    anatomy             where their decoder layers live
    checkpoint          folders of files: whole or damaged, and what identifies them
    cost                what a model takes to keep and to run, told from its configuration
    adapters            LoRA adapters merged into their base
    demo                the bundled model, converted once
    cache               where such checkpoints are kept

Text
    data                sources, tokenised and drawn by weight
    chat                conversations
    packing             rows of one length
    document_masks      documents of a row stay apart in every family
    abilities           seeded items for retrieval, knowledge and reasoning, and how written answers are matched
    overlap             evaluation items in training text
    loops               whether a text ends in one

Figures
    figures             layers, training, before and after
    atlas_figure        sweeps
    depth_figure        the stack of layers
    diagnostics_figure  depth diagnostics and probes
    level_figure        score against level
    pareto_figure       what is kept against what it costs

This process and its machine
    errors              what a user can fix, and how it is said
    progress            what takes long says so: bars, lines, time left
    runtime             ranks, logging, seeding, environment stamp
    stopping            Ctrl-C, SIGTERM, and the end of all that was started
    machine             memory, disk, speed
    numerics            the precision that a device multiplies fast in
    plain_text          numbers and tables for a terminal
    task_words          words instead of task identifiers
    schedule            the learning rate of loops of our own
    tracking            the Weights & Biases run
    tracked             what is logged there
    redaction           secrets stay here
    trust               what of a run directory of somebody else is believed

The rooms stand at the top of the repository:

    compress            measure layer importance, choose layers, cut
    train               distil the cut model back
    eval                retrieval, knowledge and reasoning before and after; the report; the Hub

Data flows one way, all in one run directory:
importance.json -> plan.json -> student/ -> distilled/ -> eval/*.json -> report.html
"""

__version__ = "0.1.0"
