"""Layer 2: the two levels of IR. graph: what is computed; plan: how. No field holds target text."""
