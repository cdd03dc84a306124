"""Trained networks as ONNX files, checked against PyTorch, with a description of what inference needs."""
