"""Diptych beside other engines: same weights, same prompts, same client, alternating in one run.

`engines` says how each one is started, `process` starts, halts and wakes it, `workloads` are the
loads, `rows` is the table of comparisons, `prepare` makes the files that each engine reads.
"""
