"""Verbs that make a model smaller and faster, and win back what was lost."""
