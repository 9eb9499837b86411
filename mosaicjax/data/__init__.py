"""Documents, tokenizers, the token store, and the stream of batches read from it."""
