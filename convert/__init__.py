"""From a checkpoint to a pack: read the source's tensors by byte range, quantize them, write blocks. numpy only."""

import os

# Workers are the threads here: a linear algebra library that starts its own in each of them fights for the cores. It
# reads this when numpy is first imported, after this line where a command starts; the user's own setting stays.
for variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
    os.environ.setdefault(variable, "1")
