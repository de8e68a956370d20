"""Verbs that teach a text-to-image pipeline a concept, and draw with it."""
