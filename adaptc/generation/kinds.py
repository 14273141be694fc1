"""Choose the class that generates with a program, by the program's spec."""

from __future__ import annotations

from adaptc.generation.causal_generator import causal_generator_class
from adaptc.generation.encoder_decoder import encoder_decoder_class
from adaptc.generation.generator import Generator
from adaptc.generation.seq2seq.seq2seq_spec import Seq2SeqSpec
from adaptc.generation.spec import GenerationSpec
from adaptc.packages.packaged_program import PackagedProgram
from adaptc.program.adapted_program import AdaptedProgram


def make_generator(runner: AdaptedProgram | PackagedProgram, spec: GenerationSpec) -> Generator:
    """Return the generator that runs ``runner``: a program, or a package of one."""
    if isinstance(spec, Seq2SeqSpec):
        return encoder_decoder_class(spec.feature_shape is not None)(runner, spec)
    return causal_generator_class()(runner, spec)
