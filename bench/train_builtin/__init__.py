"""Training of the built-in model: checkable tasks, tokenizer, model, loop and evaluation."""
