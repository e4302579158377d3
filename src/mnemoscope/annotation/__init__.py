"""Blinded sheets, on which people say whether they see patterns where there are none, and their scores."""
