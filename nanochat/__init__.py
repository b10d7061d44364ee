"""A GPT-2-class language model, trained end to end by one person, from one number."""
