"""What a user gives as text, cut into contexts of tokens, and these into shards of fixed batches. Imports no torch.

samples, sources, tabular, readers   where documents come from
sampling, split, segment, corpus     which of them are read, and where they are cut
vocabulary, spelling, tokenizer      what tokens look like, and what stands around a text
plan                                 contexts in shards: the unit of work, of checkpoints and of distribution
"""
