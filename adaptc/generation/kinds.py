"""Choose the class that generates with a program, by the program's facts."""

from __future__ import annotations

from typing import Any

from adaptc.generation.encoder_decoder import encoder_decoder_class
from adaptc.generation.generator import Generator, generator_class
from adaptc.generation.seq2seq.seq2seq_spec import Seq2SeqSpec
from adaptc.generation.spec import GenerationSpec


def generator_of(runs: Any, facts: GenerationSpec) -> Generator:
    """Return the generator that runs ``runs``: a program, or a package of one."""
    if isinstance(facts, Seq2SeqSpec):
        return encoder_decoder_class(facts.features is not None)(runs, facts)
    return generator_class()(runs, facts)
