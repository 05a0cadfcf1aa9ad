"""Measurements beside peers; one command prints one table."""
