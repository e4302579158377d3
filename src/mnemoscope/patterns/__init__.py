"""What neurons detect: a language of patterns, and a search with calibrated p-values. Nothing here needs torch.

1. Write patterns down (`pattern`: specs, their names and kinds) and find where they hold (`language`: masks; made of
   `sequences`, `forms`, `foreign` and `columns`).
2. Mine a text for all the patterns that it has (`language`, `topics`), and join those that hold at the same prefixes
   (`space`).
3. Score each pattern by how many triggers of a unit share it (`score`), and combine the best (`combine`: any of
   several, all of several).
4. Calibrate: drawn sets of triggers go through the same search, and tell how small a tail chance finds
   (`calibration`). `search` does 3 and 4 for every unit; `whole` looks at the whole distribution instead of triggers.

`triggers` holds the units of a run and how they are searched, `summary` and `labels` say what its patterns amount to.

An example. Of 25 triggers of a unit nine have the mask of `word:river`, which holds at .0004 of the prefixes of their
strata: log P(X >= 9) is -56. `words:river,lake,sea` is shared by eleven; its tail must be smaller by the price of
naming two further words. Of 2,000 drawn sets none has a best tail as small: p_family, from an exponential fitted
to the lowest of them, is far below .05.

prefix     the tokens of a context up to a row; it *counts* unless it ends at position 0 or in a special token
mask       bool[prefix]: where a pattern holds;  column: the mask of a class of patterns, in a matrix
trigger    a prefix at which a unit is most active;  set: the triggers of one unit, real or drawn
slot       a place in a set, at most 64;  bits: which slots have a pattern, as one integer
point      a counted prefix of a space
stratum    points of like position and like frequency of the last token: what chance is taken at (N1)
base       the mean over the triggers of the share of their stratum that has the pattern
tail       log probability of as many hits by chance;  price: nats for each further part of a compound
tests      a family of tests: main, next (the next token), position, whole
aspect     what a pattern looks at, such as the last token: within one, patterns repeat each other
N1, N2     beyond position and frequency; beyond the last token
"""
