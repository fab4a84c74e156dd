"""Bytes of a pack: format, geometry, manifest, reading, writing, verification. FORMAT.md is the normative text.

    from moepack.layout.reader import Pack
    pack = Pack.open("model.moepack")

Standard library and numpy only, so that a pack can be read and checked without torch.
"""
