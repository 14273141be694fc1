"""Parse and write adapter files of other programs than PEFT, one file per format.

All formats have one protocol (``parts``), and are told apart by their keys (``detect_format``). This package sees keys
and tensors only; callers that know the model find the modules that are meant.
"""
