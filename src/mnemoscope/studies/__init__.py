"""Every figure and table of the two papers, for any model: measured once, then told from the tables.

1. Choose (`catalogue`): a row for each family of questions says which items of the papers it answers, which tables it
   reads, which sizes it depends on and what it costs.
2. Measure (`run`, `measures`; torch): what the run has no tables for yet, in the order of the catalogue. Examples are
   drawn (`measures.positions`) and read shard by shard; finished shards are kept, so that a killed study goes on.
3. Tell (`findings`; no torch): from the tables of a run to findings, each a sentence with its numbers, their intervals
   (`mnemoscope.intervals`), what chance gives beside them, and how to draw them. `views` shows them.
4. `compare` sets the findings of two runs side by side.

An example. `mnemoscope study -o runs/demo --only removal`: Geva et al. 2021 say that triggers lose most with their last
token (A9). `measures.removal` samples 200 documents and reads their triggers whole and without one token, and beside
each an ordinary prefix of the same neuron: the table `removal`. `findings.removal` sums over documents, resamples
these a thousand times, and says of SmolLM2-135M: the coefficient changes by -86.2 % [-86.9, -85.6] without the last
token and by -7.0 % [-8.1, -6.1] without a random one. A figure of both over the layers goes with it, and beside it what
is left of ordinary prefixes. To add a measurement, write a file in both packages and a row in `catalogue` and `run`.

Glossary
    item         an analysis of the papers or an objection to one, A1 to A80
    measurement  a row of the catalogue: a family of items with one measure and one analysis
    measure      from a run, its model and sizes to tables that are added to the run
    analysis     `findings(run)`, from tables to findings; pure
    sizes        how much is read, and the seed; kept with the tables
    example      a prefix, looked at where it ends; of a held-out document
    shard        so many examples: the unit of work and of what is kept
    point        where the stream is looked at: the embedding, then after each attention and feed-forward layer
    target       the token whose probability is followed: the model's choice, the true one, or a null token
    foil         another answer of the same kind, which the target is compared with
    partner      another example whose values stand in for an example's own: a null
    unit         `model`, or its copy with shuffled weights: a null
    grid         rows of a table as an array of examples x places (layers, points), resampled by document
"""
