"""Score teacher, pruned and distilled on the same items, say what may be said of the difference, and show it.

    evaluate  the artifact of one role, a few scores in the middle of training, what both cost
    speed     tokens per second, memory, size

Folders:

    compare     several runs side by side
    harness     lm-eval's requests over a model in memory, and what it answered
    report      one page about a run, and its model card
    tasks       what is asked, by name
"""
