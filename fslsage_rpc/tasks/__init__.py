"""The tasks by the dataset that the configuration names."""

from fslsage_rpc.config import Config
from fslsage_rpc.tasks.base import Batches, Samples, Score, Task

__all__ = ["Batches", "Samples", "Score", "Task", "open_task"]


def open_task(config: Config) -> Task:
    """The task of a configuration.

    Raises:
        InputError: a dataset of the user's own is not what it should be.
    """
    if config.data.name == "e2e":
        from fslsage_rpc.tasks.language import LanguageTask  # needs the `llm` extra

        return LanguageTask(config)
    from fslsage_rpc.tasks.images import ImageTask

    return ImageTask(config)
