"""From a source of preference pairs to batches of tokens."""
