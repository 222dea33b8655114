"""Score teacher, pruned and distilled on the same items, say what may be said of the difference, and show it.

Tasks: what is asked
    tasks               by name: ours, the user's, lm-eval's
    task_names          which names there are, without importing anything
    data_sets           what tasks are made of
    rows                question, options and answer of a row
    protocols           one data set under every protocol
    suites              what an evaluation costs

Scoring: lm-eval's requests, no token computed twice
    evaluate            the artifact of one role
    engine              lm-eval's interface over a model in memory
    decoder             hidden states, logits, a cache whose rows branch
    beginnings          what prompts begin with alike
    scoring             likelihoods
    generation          greedy text
    perplexity          running text
    samples             from lm-eval's log to scores per item
    rates               how written text fails
    item_cache          answers on disk as they come in
    quick               a few scores in the middle of training
    speed               tokens per second, memory, size
    same_tokenizer      whether roles read the same tokens
    item_texts          what is asked, to look for it in training text

Statistics: what may be claimed
    statistics          intervals, paired tests, retention
    intervals           in closed form
    resampling          by bootstrap, for many variants at once
    ranking             of plans, before and after a heal

Report: one page
    findings            what a run directory holds
    headline            the first sentences
    cautions            what speaks against the numbers
    sections            what the model can do
    details             how it was done
    speed_section       speed and size
    speed_ratio         how many times as fast, with its range
    search_section      what a search found
    search_table        its table
    flips               items that changed sides
    document            blocks, whatever they look like
    wording             how numbers are written
    page                as HTML
    report              report.html, report.md, figures
    score_rows          the table for programs

Compare: several runs
    compare             side by side
    comparable          which may stand in one table
    compare_data        for scripts
    compare_page        for readers

Export: the Hub
    card                the model card
    license             under which license
    hub                 the push
"""
