"""Text to token shards: read, clean, deduplicate, train a tokenizer, pack."""
