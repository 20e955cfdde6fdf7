"""Libraries that say nothing a user could do anything about."""

import os
import warnings


def quieten() -> None:
    """Silence what a user can do nothing about. Imports transformers."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    warnings.filterwarnings("ignore")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
