"""diffusers' loaders are what pipelines are compared with; what they say of themselves is no matter here."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from adaptc import AdaptcWarning


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers asks for a newer peft than the one that tests are pinned to, and what is used of it here works with
    both."""
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.18.0")
    said = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".* was captured for some sizes alone", category=AdaptcWarning)
        yield
    diffusers_logging.set_verbosity(said[0])
    transformers_logging.set_verbosity(said[1])
