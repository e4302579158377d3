"""Patterns tested both ways on text that the model reads: does active mean the pattern, and the pattern active?

job        the stages: search, hold out, read, count, decide
heldout    which patterns of triggers are worth reading text for
ground     the text as one pass sees it, masked by patterns;  looks  what a pass counts;  counting  compiled loops
outcomes   from counts to verdicts
hypothesis a user's own claim
"""
