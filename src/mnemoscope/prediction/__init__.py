"""One prediction taken apart, exactly, in nats.

    bases, bounds, search      what vectors do to a log-probability, and the largest without evaluating all
    scene, explain, switching, switched, ablate   a traced prediction, its parts, and who switched on what
    questions, prompts, batch  from texts to tokens; many prompts as one table
    explanation, headline      the result, as frames and as a sentence (no torch)

What vectors do to the log-probability of one token, exactly, and the largest of them without evaluating all.

With x fixed, adding v moves the logits by ``delta`` and the log-probability of the target w by

    C(v) = log p(w | x + v) - log p(w | x) = delta_w - log sum_j p_j exp(delta_j),   p = p(. | x)

(Yu et al. 2023, Eq. 19; A38, A39). Under every lens ``delta = multiplier * U dv`` for a direction ``dv``: v after the
lens's norm (raw, frozen), or what v changes in the normalised x (own). Hence one set of bounds for the three lenses.
With S the tokens that were evaluated (none at first), T the rest, P_T its probability and mean_T, var_T over p on T,

    P_T exp(mean_T) <= sum_T p_j exp(delta_j) <= P_T exp(mean_T) (1 + var_T phi(R)),   phi(R) = (e^R - 1 - R) / R^2

by Jensen on the left and Bennett (R >= delta_j - mean_T for all j in T) on the right. ``mean_T`` is one dot product,
``var_T <= |dv|^2 sum_T p_j |U_j - mean|^2 / P_T`` and R follow from |dv|, so that the first interval costs a matrix
product with one vector per layer. `search` keeps what can still be among the k largest or k smallest and evaluates it
on more and more tokens, the most probable first; then ``var_T <= max_T p_j dv^T (scatter of U) dv / P_T`` holds as
well, and is tight where p is flat. Where bf16 is native, a `Screen` then takes T in bf16, certain
up to rounding. What is left is evaluated on all tokens.

`Survey` asks less and says more: the interval of every part, narrow where its sign is open, the extremes exact. As only
delta_w knows the target, what it says of one token holds for any other, moved by what a part does between their logits.

A soft cap makes delta non-linear in v; then every vector is evaluated (`search` does so by itself).
"""
