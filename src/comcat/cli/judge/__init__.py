"""Verbs that look at models and pictures and change nothing: structure, accuracy, time, likeness."""
