"""Layers: frozen dataclasses that declare their weights and apply them, purely."""
