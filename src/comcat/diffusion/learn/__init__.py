"""Teaching a pipeline a concept from a few pictures."""
