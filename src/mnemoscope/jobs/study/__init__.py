"""The measurements of the study that need the model; `catalogue` lists them, `run` does them."""
