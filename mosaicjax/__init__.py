"""mosaicjax: efficient LLM training in JAX, TPUs first, with the bill in dollars per token."""
