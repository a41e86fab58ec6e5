"""Tasks: rows of a prompt and the text to produce, in three splits."""

from sparselet.tasks.task import Task, load_task

__all__ = ["Task", "load_task"]
