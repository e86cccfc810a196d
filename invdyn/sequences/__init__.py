"""Recordings in: one reader per file format, one interface."""
