"""Models: the pure decoder, and one file a family with its sizes and choices."""
