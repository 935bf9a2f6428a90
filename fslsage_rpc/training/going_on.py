"""What a run goes on from: its last checkpoint, or, when a rank was lost or joins, what the ranks have in
memory.

Clients of lost ranks are away: they take part in no round, and rank 0 keeps what the last checkpoint had of
them. When a rank comes that hosts them, they are back, with the averaged weights.
"""

from collections.abc import Sequence
from typing import Any

from fslsage_rpc.data.participation import hosted_by
from fslsage_rpc.errors import TooFewClients
from fslsage_rpc.job.world import Change, World
from fslsage_rpc.runs.checkpoint_files import Damaged, Manifest, RankState, State, read_manifest
from fslsage_rpc.runs.checkpoints import Checkpoints, read_state, snapshot
from fslsage_rpc.runs.run_folder import RunFolder
from fslsage_rpc.runs.screen import Screen
from fslsage_rpc.training.assembly import hosted_clients
from fslsage_rpc.training.experiment import Experiment

Event = dict[str, Any]


def from_checkpoint(
    experiment: Experiment, world: World, manifest: Manifest, folder: RunFolder | None
) -> RankState:
    """Collective: this rank's part of a checkpoint. Clients that were away are back: all ranks are there."""
    events: list[Event] = world.transport.broadcast(folder and folder.events)
    experiment.federation.follow(events)
    present = experiment.federation.present(manifest.rounds)
    back = [
        {
            "event": "joined",
            "round": manifest.rounds + 1,
            "rank": home + world.transport.size - world.homes,
            "clients": away,
        }
        for home in range(world.homes)
        if (away := [id for id in hosted_by(home, world.homes, len(experiment.parts)) if id not in present])
    ]
    mine = hosted_clients(experiment, world)
    saved = read_state(manifest, mine, world.hosts_server)
    if returning := [client for client in mine if client not in present]:
        others = read_state(manifest, present[:1], server=True)
        saved.aggregation = others.aggregation
        for client in returning:
            left = saved.clients.get(client)
            saved.clients[client] = returning_state(client, others.clients[present[0]], left, others)
    if folder:
        folder.add_before(back)
    experiment.federation.follow([*events, *back])
    return saved


def from_memory(
    experiment: Experiment,
    world: World,
    checkpoints: Checkpoints,
    folder: RunFolder | None,
    screen: Screen,
) -> RankState | None:
    """Collective: the state, of the ranks that have met anew, from which a round is done (again); None at the
    start of a run.

    It is the newest one that all of them have; a rank that has just joined has none.
    """
    memory = checkpoints.memory
    remembered = world.transport.gather((world.home, sorted(memory)))
    news: tuple[int, list[Event], list[int]] | None = None
    if folder and remembered:
        rounds = max(set.intersection(*(set(known) for _, known in remembered if known)))
        newcomers = [home for home, known in remembered if not known]
        folder.go_back(rounds)
        away: dict[int, State] = {}
        for change in world.take_changes():
            event = _event(
                change, rounds, list(hosted_by(change.rank - 1, world.homes, len(experiment.parts)))
            )
            folder.add_event(event)
            if change.reason is not None:
                away |= _last_states(checkpoints, event["clients"])
        if known := memory.get(rounds):
            known.clients |= away  # at once: another rank may be lost before all of this is done
        screen.show_changes(folder.rounds, folder.events, rounds)
        news = rounds, folder.events, newcomers
    rounds, events, newcomers = world.transport.broadcast(news)
    experiment.federation.follow(events)
    mine = memory.get(rounds)
    state = mine and snapshot(mine)
    if newcomers and rounds:
        returning, aggregation = _send_back(experiment, world, state, newcomers, rounds)
        if state is None:
            clients = {c: returning[c] for c in hosted_clients(experiment, world)}
            state = RankState(rounds, clients, None, {}, aggregation)
        elif world.hosts_server:
            state.clients = {c: kept for c, kept in state.clients.items() if c not in returning}
    checkpoints.memory = {rounds: state and snapshot(state)}
    return state


def _send_back(
    experiment: Experiment, world: World, state: RankState | None, homes: Sequence[int], rounds: int
) -> tuple[dict[int, State], State]:
    """Collective: the states of the newcomers' clients, which rank 0 makes of its own and a client rank's;
    and that of their aggregation.
    """
    mine = None
    if state and not world.hosts_server:
        mine = next(iter(state.clients.values())), state.aggregation
    peers = world.transport.gather(mine)
    returning = None
    if peers:
        assert state is not None
        peer = next((each for each in peers if each is not None), None)
        if peer is None:
            raise TooFewClients(
                "only ranks that have just joined are left: the run ends at its last checkpoint"
            )
        one, aggregation = peer
        clients = [id for home in homes for id in hosted_by(home, world.homes, len(experiment.parts))]
        returning = (
            {id: returning_state(id, one, state.clients.get(id), state) for id in clients},
            aggregation,
        )
    states: tuple[dict[int, State], State] = world.transport.broadcast(returning)
    return states


def returning_state(client: int, peer: State, left: State | None, server: RankState) -> State:
    """The state of a client that is back.

    Its weights are the averaged ones, its auxiliary model the one that the server has for it (or, where
    clients train it, the averaged one). Its optimizers go on as the last checkpoint before its loss had them,
    or start anew where it was in none; schedules of learning rates catch up with the rounds missed.

    Args:
        peer: the state of a client that was there.
        left: what that checkpoint had, with its `rounds`.
        server: the server's rank's state.
    """
    left = left or {}
    state: State = {
        "weights": peer["weights"],
        "optimizer": left.get("optimizer"),
        "rounds_missed": server.rounds - left.get("rounds", 0),
    }
    assert server.server is not None
    fit = server.server["fits"].get(client)
    if "auxiliary_weights" in peer:
        state["auxiliary_weights"] = fit["weights"] if fit else peer["auxiliary_weights"]
    if "auxiliary_optimizer" in peer:
        state["auxiliary_optimizer"] = left.get("auxiliary_optimizer")
    return state


def _event(change: Change, rounds: int, clients: list[int]) -> Event:
    event = {"event": "loss" if change.reason else "joined", "round": rounds + 1, "rank": change.rank}
    reason = {"reason": change.reason} if change.reason else {}
    return {**event, "clients": clients, **reason, "seconds": round(change.seconds, 3)}


def _last_states(checkpoints: Checkpoints, clients: list[int]) -> dict[int, State]:
    """What the newest checkpoint has of them, with its `rounds`; nothing where there is none."""
    folder = checkpoints.newest()
    try:
        found = read_manifest(folder).read(clients, server=False) if folder else None
    except Damaged:
        return {}
    if found is None:
        return {}
    return {client: {"rounds": found.rounds, **state} for client, state in found.clients.items()}
