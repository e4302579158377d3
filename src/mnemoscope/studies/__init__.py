"""Every figure and table of the two papers, for any model: measured once, then told from the tables.

catalogue, run     what there is to measure, and the measuring of what a run does not have yet
measures           from a model to tables (torch)
findings           from tables to sentences, numbers and figures (no torch)
"""
