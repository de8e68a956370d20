"""Low-rank terms on the attention of a pipeline: found, attached, saved, loaded, scaled, fused and merged."""
