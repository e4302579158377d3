"""Do people see patterns where there are none? A blinded sheet with hidden null items, and its scores (A5, A7, A73)."""
