"""Tuning: training a model on, from labels, from a teacher, or from both."""
