"""Patterns tested both ways on text that the model reads: does active mean the pattern, and the pattern active?

1. Search the triggers of the discovery half for candidates (`patterns.search`), and hold these against the triggers
   of the test half (`heldout`). No model is needed.
2. Read text of a half with the model and count (`masked_text`, `counts`, and the compiled loops of `counting`): in
   each layer of each batch, how often a unit is active where a pattern is, and elsewhere.
3. Decide in the discovery half (`discovery`): which candidate is the claim, and from which score the unit is active.
4. Decide in the test half (`outcomes`): F1 and its interval, what the nulls reach, the verdict.

`job` does all four for every unit of a run; `hypothesis` does the last three for one neuron and a user's own claim.
In a mixture of experts the text of that neuron is what is routed to its expert (`groups`).

An example. Nine of the strongest triggers of neuron L3N7, when positive, end with "river": `word:river` is a
candidate, and so is `word:river@16`. Triggers of the test half show it too (q = .001). The model reads 65,536 tokens
of the discovery half, where `word:river` has the larger F1 when active is a score of 120 or more. It reads as many
of the test half: of 40 active tokens 38 end with "river", and of 45 that do 38 are active, so precision is .95,
recall .84, F1 .89. No random direction of the layer reaches that: the verdict is `iff`.

Which figures may stand alone: F1, IoU and Pearson's correlation fall when half of a pattern's labels are taken away at
random, and when as many are added (`patterns.sanity`, on the claims of every run); average precision does for rare
patterns, and of common ones may rise with labels that are added. Recall does not see the former, precision does not
see the latter: they are shown as two sides of one claim.

unit       a neuron or a pseudo-neuron of a null, with a polarity
polarity   +1 or -1: the end of the coefficients that is looked at
score      the bin of the coefficient, counted from the other end where the polarity is negative
active     a score at or above the threshold of the claim
candidate  a pattern that may describe a unit;  spec: how a pattern is written
column     the mask of one pattern, in a matrix of them
claim      a unit, a polarity and a column; the chosen candidate
both       tokens at which the unit is active and the pattern is there;  shown: those where it is there
precision  both / active, P(pattern | active);  recall: both / shown, P(active | pattern)
stratum    prefixes of like position and like frequency of the last token: what chance is taken at (N1)
group      documents that are drawn again together
null       a pseudo-neuron: a random direction, a rotated basis, shuffled weights
"""
