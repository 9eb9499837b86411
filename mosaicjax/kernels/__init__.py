"""Kernels, each beside the plain function that defines it."""
