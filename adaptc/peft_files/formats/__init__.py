"""Adapter files of other programs than PEFT: one file per format, all with one protocol (``parts``), told apart by
their keys (``detect``). Keys and tensors alone: which modules are meant is found by who knows the model."""
