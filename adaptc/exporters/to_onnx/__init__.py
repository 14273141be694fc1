"""ONNX files with adapters as inputs, adapters for them, and sessions of ONNX Runtime that choose one in each call."""
