"""Models out of PyTorch: files that a runtime loads, checked against the model that they were made from.

    comcat.export(small, to="onnx", out="small.onnx")  # and small.onnx.json: preprocessing, classes, what was compared
    deployed = comcat.open_exported("small.onnx")  # a module that runs in ONNX Runtime, for evaluate and benchmark

Formats are ``onnx``, ``torch`` (``torch.export``'s .pt2) and ``openvino`` (a folder).
"""
