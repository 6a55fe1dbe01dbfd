"""Layer 3: both levels of the IR, run in numpy float64 without templates, torch or a GPU.

graph.py runs a graph densely; plan.py runs a plan tile by tile as the kernels would; coverage.py counts how often
the walks visit every (query, key). Where the first two agree, the passes between them kept the meaning.
"""

from nsagen.errors import MissingPackage

try:
    import numpy  # noqa: F401
except ImportError:
    raise MissingPackage("nsagen.interp", "numpy", "bench") from None
