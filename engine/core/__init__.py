"""The nouns: types, parameters, requests, plans, messages, configuration, errors (floor 0)."""
