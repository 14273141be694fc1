"""OpenVINO files with adapters as inputs, and models of OpenVINO that choose one in each call."""
