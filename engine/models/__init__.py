"""Model families: one decoder, parameterised by its configuration."""
