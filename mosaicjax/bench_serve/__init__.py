"""The load that a server bears: requests to any OpenAI-compatible one, and how soon their text comes."""
