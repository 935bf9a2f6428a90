"""The tasks by the dataset that the configuration names."""

from fslsage_rpc.config.own import checked_arguments, first_line, import_own, is_own, refuse_arguments
from fslsage_rpc.config.schema import Config
from fslsage_rpc.errors import InputError
from fslsage_rpc.tasks.base import Batches, Samples, Score, Task

__all__ = ["Batches", "Samples", "Score", "Task", "open_task"]

ATTRIBUTES = ("sample_shape", "label_shape", "classes", "groups")


def open_task(config: Config) -> Task:
    """The task of a configuration.

    Raises:
        InputError: a dataset or task of the user's own is not what it should be.
    """
    name = config.data.name
    if not is_own(name):
        refuse_arguments("data.arguments", name, config.data.arguments)
    else:
        kind = import_own("data.name", name, "a function that returns images and labels, or a Task")
        if isinstance(kind, type) and issubclass(kind, Task):
            return _open_own(kind, config)
    from fslsage_rpc.tasks.images import ImageTask

    return ImageTask(config)


def _open_own(kind: type[Task], config: Config) -> Task:
    """A task of the user's own."""
    wrong = f"data.name: got {config.data.name!r}, a Task"
    if missing := sorted(kind.__abstractmethods__):
        raise InputError(f"{wrong} that lacks {', '.join(missing)}")
    more = checked_arguments("data.arguments", config.data.name, kind, config.data.arguments, first=1)
    try:
        task = kind(config, **more)
    except InputError:
        raise
    except Exception as error:  # the user's class may raise anything
        raise InputError(f"{wrong} that fails ({first_line(error)})") from None
    if unset := [name for name in ATTRIBUTES if not hasattr(task, name)]:
        raise InputError(f"{wrong} that does not say its {', '.join(unset)}")
    return task
