"""What neurons detect: a language of patterns, a search with calibrated p-values. No torch."""
