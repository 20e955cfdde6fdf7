"""One way to silence libraries whose warnings and progress bars a user can do nothing about."""

import logging
import os
import warnings
from collections.abc import Iterable


def quieten(loggers: Iterable[str] = ()) -> None:
    """Silence Python's warnings, transformers, and the loggers named in `loggers`. Imports transformers."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else tokenizers warns in every process that is forked
    warnings.filterwarnings("ignore")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in loggers:
        logging.getLogger(name).setLevel(logging.CRITICAL)
