"""Serving: many requests at once on one model."""
