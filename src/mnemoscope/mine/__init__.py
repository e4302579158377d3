"""One pass of a text through a model, and what it keeps of every neuron.

    coefficients ─ scan ─ LayerReading ─┬─ Triggers    the largest and the most negative, each with its place
                                        ├─ Moments     four power sums, extremes, positive counts
                                        ├─ Histograms  counts over fixed bins           (a share of the contexts)
                                        └─ Samples     one place from each part of the range     (the same share)

`statistics` is all four, of neurons and of pseudo-neurons, and `loop` feeds them: batches, checkpoints,
workers. `build` makes a run of it, with the `values`; `verify` recomputes one. States are plain arrays, declared once,
and merge to the same bits in whatever order (the laws are in tests/test_accumulate.py). Only counted positions are ever
read.
"""
