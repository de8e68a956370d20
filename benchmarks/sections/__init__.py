"""The sections of the page of results: a result, as its script wrote it, becomes text with its tables."""
