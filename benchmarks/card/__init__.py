"""What is measured on a card: ``speed``, ``accuracy``, ``adapter``. ``packed`` is what travels to it.

``python benchmarks/gpu.py`` runs it, ``python benchmarks/gpu_pack.py`` packs.
"""
