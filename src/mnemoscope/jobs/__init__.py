"""One file per job: what a job feeds to the one loop that runs the model."""
