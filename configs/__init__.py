"""What to run: `models/*.json`, one Hugging Face config.json per released text checkpoint, and experiment files.

A model file holds what is known of the released one: `sliding_window` and `max_window_layers`, which do nothing while
`use_sliding_window` is false, are left out where the released values are not known.
"""
