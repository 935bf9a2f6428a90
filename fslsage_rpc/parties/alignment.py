"""FSL-SAGE's alignment, as the server carries it out: while its client waits, or behind the training."""

import itertools
from collections.abc import Callable

from fslsage_rpc.device.memory import give_back_free_pages
from fslsage_rpc.device.streams import Place, current_place
from fslsage_rpc.errors import InputError
from fslsage_rpc.measure.activity import Abandoned
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
    """One alignment of one client, who waits for it.

    Its lane comes to it as to any request, and goes on while another thread fits the auxiliary model: clients
    are fitted side by side. The true gradients are the lane's work, or that thread's on the lane's snapshot.
    """

    def __init__(self, execution: Execution, lane: Lane, fit: AuxiliaryFit, crew: Crew):
        self._execution, self._lane, self._fit, self._crew = execution, lane, fit, crew

    def run(self) -> None:
        """On the lane's thread and turn; the answer comes from another."""
        with self._execution.part("lane"), self._lane.phase(Phase.TARGETS, self._execution.arrow):
            self._fit.start()
            targets = true_gradients(self._execution, self._lane, self._fit)
        self._crew.run("fit", self._execution.request.client, lambda: self._finish(targets))

    def _finish(self, targets: Callable[[], list[Target]]) -> None:
        """Fit the model, and answer."""
        execution, fit = self._execution, self._fit
        queue = fit.context.queue
        with queue.after(execution.place):
            with execution.part("fit"):
                with fit.context.timeline.phase(Phase.ALIGNMENT):
                    computed = targets()
                    queue.keep(*(tensor for target in computed for tensor in target))
                    fit.fit(computed, execution.at)
                answer = fit.hand_out(execution.at, execution.request.number)
                fit.take_up()
            execution.answer_once_done(answer, queue, "fit", execution.request.client)
        _give_back()


class AlignmentBehind:
    """One alignment of one client, who goes on meanwhile, and collects the fitted model rounds later.

    The round in which it is begun ends when the true gradients are there. The fit has what cores the lanes
    leave it, and rests between two rounds.
    """

    def __init__(self, client: int, fit: AuxiliaryFit, crew: Crew):
        self._client, self._fit, self._crew = client, fit, crew
        self._fitted = False
        self._collecting: Execution | None = None

    def begin(self, execution: Execution, lane: Lane) -> None:
        """On the lane's thread and turn."""
        fit = self._fit
        with execution.part("lane"), lane.phase(Phase.TARGETS, execution.arrow):
            inputs = fit.begin(execution.at)
            targets = true_gradients(execution, lane, fit)
        execution.answer_once_done(None, lane.context.queue, "lane", lane.number)

        def compute() -> None:
            queue = fit.context.queue
            with queue.after(execution.place):
                with self._crew.activity.of("fit"), fit.context.timeline.phase(Phase.ALIGNMENT):
                    inputs.targets = targets()
                    queue.keep(*(tensor for target in inputs.targets for tensor in target))
                self.run()

        self._crew.run("targets", self._client, compute)

    def run(self) -> None:
        """Fit the model to the true gradients, which are there, beside everything else."""
        place = current_place(self._crew.device)  # behind which the true gradients are
        self._crew.run("fit", self._client, lambda: self._fit_behind(place), awaited=False)

    def collect(self, execution: Execution) -> None:
        """Answer with the fitted model, once it is there."""
        with self._crew.changed:
            self._collecting = execution
            if not self._fitted:
                return
        self._crew.run("collect", self._client, self._hand_out)  # behind no other client's fit

    def _fit_behind(self, place: Place) -> None:
        fit, crew = self._fit, self._crew
        inputs, queue = fit.inputs, fit.context.queue
        assert inputs is not None
        assert inputs.targets is not None

        def give_way() -> None:
            queue.wait()  # a GPU would have whole passes queued
            with fit.context.timeline.paused():
                crew.activity.give_way()

        working = crew.activity.of("fit")
        try:
            with queue.after(place), working, fit.context.timeline.phase(Phase.ALIGNMENT):
                fit.fit(inputs.targets, inputs.at, give_way)
        except Abandoned:
            return
        with crew.changed:
            self._fitted = True
            if self._collecting is None:
                return
        self._hand_out()

    def _hand_out(self) -> None:
        execution, fit = self._collecting, self._fit
        assert execution is not None
        queue = fit.context.queue
        with queue.after(execution.place):
            with execution.part("fit"):
                answer = fit.hand_out(execution.at, execution.request.number)
            execution.answer_once_done(answer, queue, "fit", self._client)
        _give_back()


def true_gradients(execution: Execution, lane: Lane, fit: AuxiliaryFit) -> Callable[[], list[Target]]:
    """What gives the true gradients of the buffer as it is now, by the lane's model as it is now.

    Raises:
        InputError: the buffer is empty.
    """
    if not len(fit.buffer):
        raise InputError(
            f"algorithm.name: got one that aligns client {execution.request.client} when it has uploaded "
            "nothing, expected a Push before the first alignment"
        )
    batches, at, snapshot = fit.batches(), execution.at, lane.snapshot
    if snapshot is None or not snapshot.take(lane.weights):
        targets = fit.targets(lane.model, at, batches)
        return lambda: targets

    def compute() -> list[Target]:
        try:
            return fit.targets(snapshot.model, at, batches)
        finally:
            snapshot.give_back()

    return compute


def _give_back() -> None:
    if next(_fits_made) % FITS_BETWEEN == 0:
        give_back_free_pages()
