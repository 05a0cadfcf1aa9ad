"""Text to batches: sources, tokenisation, packing, and an iterator whose place can be saved and found again."""
