"""Deterministic simulation: the real scheduler, batchers and journals in virtual time.

Owns a seeded network, crash points, a supervisor's behaviour and a fake model with real KV
semantics. Invariant: a run is a pure function of its scenario, and a scenario of its seed.
"""
