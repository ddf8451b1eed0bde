"""Tests of the project; run them with pytest from the repository root."""
