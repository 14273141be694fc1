"""Choose the class that generates with a program, by the program's spec."""

from __future__ import annotations

from typing import Any

from adaptc.generation.encoder_decoder import encoder_decoder_class
from adaptc.generation.generator import Generator, generator_class
from adaptc.generation.seq2seq.seq2seq_spec import Seq2SeqSpec
from adaptc.generation.spec import GenerationSpec


def make_generator(runner: Any, spec: GenerationSpec) -> Generator:
    """Return the generator that runs ``runner``: a program, or a package of one."""
    if isinstance(spec, Seq2SeqSpec):
        return encoder_decoder_class(spec.feature_shape is not None)(runner, spec)
    return generator_class()(runner, spec)
