"""Whole ways from a model's name and a place of pictures to a result on the disk: what the verbs of the command line
do.

They open, check what can be known before the work, divide the pictures so that nothing is judged by what it was made
from, keep the place to themselves while they write to it, and leave a report. :func:`comcat.compress_to`,
:func:`comcat.prune_to`, :func:`comcat.search_to` and :func:`comcat.tune_to` are public.
"""
