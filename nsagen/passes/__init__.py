"""Layer 3: graph -> plan, one pass a file; pipeline.py lists them in order."""
