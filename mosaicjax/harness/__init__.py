"""Tasks on a model: those of lm-eval, and the Gauntlet of llm-foundry."""
