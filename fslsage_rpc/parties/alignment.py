"""FSL-SAGE's alignment, as the server carries it out."""

import itertools
from collections.abc import Callable

from fslsage_rpc.device.memory import give_back_free_pages
from fslsage_rpc.errors import InputError
from fslsage_rpc.measure.phases import Phase
from fslsage_rpc.parties.auxiliary_fit import AuxiliaryFit, Target
from fslsage_rpc.parties.crew import Crew, Execution
from fslsage_rpc.parties.lane import Lane

FITS_BETWEEN = 16
"""fits of auxiliary models, after which memory that they leave free is given back: each takes large blocks
for a while, and leaves small ones among them
"""
_fits_made = itertools.count(1)  # of this process, whose heap it is


class Alignment:
    """One alignment of one client.

    Its lane comes to it as to any request, and goes on while another thread fits the auxiliary model: clients
    are fitted side by side. The true gradients are the lane's work, or that thread's on the lane's snapshot.
    """

    def __init__(self, execution: Execution, lane: Lane, fit: AuxiliaryFit, crew: Crew):
        self._execution, self._lane, self._fit, self._crew = execution, lane, fit, crew

    def run(self) -> None:
        """On the lane's thread and turn; the answer comes from another."""
        client = self._execution.request.client
        if not len(self._fit.buffer):
            raise InputError(
                f"algorithm.name: got one that aligns client {client} when it has uploaded nothing, expected "
                "a Push before the first Align"
            )
        with self._execution.part("lane"), self._lane.phase(Phase.TARGETS, self._execution.arrow):
            targets = self._targets()
        self._crew.run("fit", client, lambda: self._finish(targets))

    def _targets(self) -> Callable[[], list[Target]]:
        """The true gradients by the lane's model as it is now."""
        fit, lane, at = self._fit, self._lane, self._execution.at
        snapshot = lane.snapshot
        if snapshot is None or not snapshot.take(lane.weights):
            targets = fit.targets(lane.model, at)
            return lambda: targets

        def compute() -> list[Target]:
            try:
                return fit.targets(snapshot.model, at)
            finally:
                snapshot.give_back()

        return compute

    def _finish(self, targets: Callable[[], list[Target]]) -> None:
        """Fit the model, and answer."""
        execution, fit = self._execution, self._fit
        queue = fit.context.queue
        with queue.after(execution.place):
            with execution.part("fit"):
                with fit.context.timeline.phase(Phase.ALIGNMENT):
                    computed = targets()
                    queue.keep(*(tensor for target in computed for tensor in target))
                    fitted = fit.fit(computed, execution.at)
                handed_out = fit.hand_out(fitted, execution.at, execution.request.number)
            execution.answer_once_done(handed_out, queue, "fit", execution.request.client)
        if next(_fits_made) % FITS_BETWEEN == 0:
            give_back_free_pages()
