"""The run directory: written whole or not at all, read by key without torch.

    with RunWriter("runs/gpt2") as writer:              # works in runs/gpt2/.work
        writer.append("triggers", rows)                 # streamed, in order, checked
        run = writer.commit(about)                      # the manifest appears last

    add_tables("runs/gpt2", {"patterns": parts}, {})    # to a finished run, which stays one

    run = open_run("runs/gpt2")                         # or s3://bucket/runs/gpt2, see remote.py
    run.rows("triggers", 13, 366)                       # one neuron, a few KB of the file

A folder is a run if and only if it holds `manifest.json`. tables.txt describes every table and column; schemas.py reads
it, and docs/format.md is generated from it.

A `Run` may be shared between threads: it holds no open file, every read opens its own, what it caches is computed from
files that no longer change, and each `sql` has a cursor of its own.
"""
