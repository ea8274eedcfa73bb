"""The tokenizer with which a run's model is used by other programs."""

from __future__ import annotations

from typing import Any

from siliang.data.jinja import with_chat_template
from siliang.run_folder.opened import OpenedRun


def served_tokenizer(run: OpenedRun) -> tuple[Any, str]:
    """The run's tokenizer with the chat template that it was trained with, and which that is, in words; as it is, and
    no words, for a run that was trained without a template."""
    if not run.task.decoder_only:
        return run.tokenizer, ""
    return with_chat_template(
        run.tokenizer, run.config.data.template, run.record.layouts, run.config.data.template_arguments
    )
