"""One prediction is taken apart, exactly, in nats.

1. Ask: texts become the tokens of prompt, target and foils (`questions`; many prompts at once: `prompts`, `batch`).
2. Trace: one forward pass, whose residuals are the sums of what heads, neurons and biases wrote (`traced`).
3. Rank: what each part does to log p(target) is computed exactly for the parts that matter, and the others are shown
   by certified bounds not to (`bases` values, `bounds` bounds, `search` the extremes, `survey` every part).
4. Tell: `explain` makes frames and contrasts of it, `switching` and `switched` say what switched a neuron on, `ablate`
   really takes parts out, and `explanation` and `headline` hold and say the result (without torch).

Example: SmolLM2-135M, "The capital of France is", target " Paris", frozen lens. At the embedding log p is -10.71, at
the end -0.26 (p = .77): 60 updates, attention and feed-forward in 30 layers, add up to the 10.45 nats between them.
Head 4 of layer 23 reads " France" with attention .90; its vector raises log p(" Paris") by 2.98 nats where it is added,
and without it the last log p would be 1.68 lower. To name the 20 best and 20 worst of 46,080 neurons by both measures,
146 are taken through the whole vocabulary. Neuron 1005 of layer 24 has the coefficient -19.2, of which -3.1 came from
neuron 916 of layer 22.

With x fixed, adding v moves the logits by ``delta`` and the log-probability of the target w by

    C(v) = log p(w | x + v) - log p(w | x) = delta_w - log sum_j p_j exp(delta_j),   p = p(. | x)

(Yu et al. 2023, Eq. 19; A38, A39). Under every lens ``delta = multiplier * U dv`` for a direction ``dv``: v after the
lens's norm (raw, frozen), or what v changes in the normalised x (own). Hence one set of bounds for the three lenses.
Only delta_w knows the target: what is known for one token holds for any other, moved by the part's logit difference.

Glossary
    target, foil    the token that is accounted for, and one that it is compared with
    lens            how a residual is read as logits: raw, own (its own norm), frozen (the norm of the final residual)
    part            a vector that is added to the stream: a head x source, a neuron's value x coefficient, a bias
    group (`Parts`) parts that are added to the same residual: the neurons of one layer, say
    base            a residual to which vectors are added; `ResidualBases` has a row for each
    direction       what a vector changes in what the unembedding reads
    increase        C(v) at the residual that the part was added to
    leave_one_out   log p(target) at the end minus the same without v, nothing reacting; `effect`: all reacting
    odds            log p(target) - log p(foil); only two logits enter
    ranking (`TopK`)  groups of which the k largest and k smallest are wanted; found, they are `ExtremeParts`
    bounds          an interval in which C(v) certainly lies, from a part of the vocabulary
    share           what a vector below a neuron gave to its coefficient; shares and bias add up
    chain           a part's own increase and what it earns by switching neurons on (A63)
    point           Lin0, Lres0, Lout0, ...: the stream before and after each update
"""
