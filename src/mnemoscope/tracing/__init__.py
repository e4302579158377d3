"""Tracing shows how unusual the coefficients of neurons are along a text of the user's own."""
