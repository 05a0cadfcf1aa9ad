"""What a run minimises: one short file for each objective."""
