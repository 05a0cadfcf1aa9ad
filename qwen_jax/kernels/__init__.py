"""Pallas kernels, each equal to a plain computation that its tests hold it to."""
