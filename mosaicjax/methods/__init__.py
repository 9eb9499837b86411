"""Efficiency methods: pure maps from a program to a program, one a file."""
