"""Writing and reading quantized models, whole or shard by shard."""
