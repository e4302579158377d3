"""Findings of the study as figures and one page."""
