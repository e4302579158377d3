"""What the study asks of the model, one file a measurement: `measure` writes its table, shard by shard."""
