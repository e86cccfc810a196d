"""Transitions (s, a, s'): index math, extraction, the store."""
