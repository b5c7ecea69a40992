"""What may be trained, and its files: masks, deltas, adapters."""
