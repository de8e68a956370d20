"""Budgets that one choice alone does not meet: time, which is measured, and two costs at once."""
