"""Losses and tasks on a model."""
