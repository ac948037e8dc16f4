"""Tasks asked through the model's chat template: one turn of the user, and the answer is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .items import Task, TaskError
from .model import Model


def chatted(model: Model, tasks: Sequence[Task]) -> list[Task]:
    """The tasks with every prompt that is answered in writing as a turn of the user.

    Choices, and code that goes on from its own beginning, stay as they are.

    Raises:
        TaskError: the tokenizer has no chat template.
    """
    if not getattr(model.tokenizer, "chat_template", None):
        raise TaskError(
            f"the tokenizer of {model.name} has no chat template; leave --chat out, or name a chat model"
        )
    return [
        _chatted(model, t) if t.format == "generation" and not _continues(t) else t for t in tasks
    ]


def _continues(task: Task) -> bool:
    """Whether what is written is read together with its prompt."""
    return any(item.tests.startswith(item.prompt) for item in task.items if item.tests)


def _chatted(model: Model, task: Task) -> Task:
    return replace(task, items=tuple(replace(i, prompt=_turn(model, i.prompt)) for i in task.items))


def _turn(model: Model, prompt: str) -> str:
    text = str(
        model.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    )
    first = model.tokenizer.bos_token
    adds = first and model.tokenizer("a")["input_ids"][:1] == [model.tokenizer.bos_token_id]
    return text.removeprefix(first) if adds else text
