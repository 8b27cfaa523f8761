"""From counts to tokens to batches."""
