"""Layer 1: all that a generated module imports. Knows nothing of the compiler. Submodules load when they are used."""
