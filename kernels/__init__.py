"""The operations of the model: one plain reference of each, and the backends that run it fast.

from moepack.kernels.backend import choose_backend
ops = choose_backend("auto")
y = ops.linear(x, matrix)
"""
