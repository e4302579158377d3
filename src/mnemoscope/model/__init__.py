"""Load a causal language model, find its parts, and prove that they add up to its logits.

    table, parts, reading      where each family keeps its parts: a row of facts; the rest is measured
    watch, stream              one forward pass, watched, as an exact sum of parts (A30-A33; G4-G6, G8)
    threads                    the same bits with any number of threads
    check, as_run              the proof, for the model as it will be run
    load, checkpoint, accepted, devices, model, state    from a name to a `Model` that notices when it is changed
    lens, capture, nulls       vectors as logits; coefficients of every neuron; units that mean nothing

A row of `table.FAMILIES` says which modules of a block are the attention output, the FFN projections and the norms, and
which fields of the config multiply what. Everything that can be measured is measured instead of listed: a norm's kind,
weight convention and epsilon are found by comparing candidates with the module's own output. A decoder that has no row
is tried against every combination of the known pieces that uses all of its norms. Whether an `Anatomy` is right is
decided by `check.self_check` alone.

Attention weights are seen, not recomputed: under the "eager" implementation the last matrix product before the output
projection is ``weights @ values`` in every family, whatever masks, positions, caps or norms came before. That this is
what the output projection reads is part of the check.
"""

import os

# Without this, MKL's products end in other bits when another number of threads computes them, and a run would show how
# many workers it had. It is read at the first product, so a choice that was made before stands; and it is set here, so
# that no file of the room can be imported without it.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
