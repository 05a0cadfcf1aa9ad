"""`python -m bench.gpu --out DIR`: everything that needs a GPU, in under eight minutes on one H100 or H200."""
