"""From a checkpoint to a pack: read the source's tensors by byte range, quantize them, write blocks. numpy only."""
