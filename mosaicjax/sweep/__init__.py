"""Sweeps: one recipe trained with every combination of some values, one run after the other."""
