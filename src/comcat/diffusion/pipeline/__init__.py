"""Other people's text-to-image pipelines: which parts they have, how each family is called, how they are opened and
kept small.
"""
