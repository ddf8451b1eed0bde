"""Text above token ids: tokenizer, chat template, detokenizer, stop strings, generation."""
