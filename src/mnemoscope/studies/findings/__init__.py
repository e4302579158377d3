"""What the tables say, one file a section: each finding is a sentence, its numbers, and how to draw them."""
