"""Exchange writes what a run and an explanation know in the formats that other tools read."""
