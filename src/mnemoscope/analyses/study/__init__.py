"""The study: the figures and tables of both papers from the tables of a run, one group of questions a file."""
