"""A run in the browser: every page of it, and questions to its model, served to this machine alone."""
