"""One client's round: its local steps by `client_step`, and what they ask of the server, watched."""

from collections.abc import Callable, Sequence
from types import GeneratorType

from fslsage_rpc.algorithms.base import Algorithm
from fslsage_rpc.errors import InputError
from fslsage_rpc.parties.client import Client, NoAuxiliary
from fslsage_rpc.parties.requests import (
    KINDS,
    TAKING_UP,
    Ask,
    BeginAlignment,
    BeginStep,
    ClientRound,
    ClientStep,
    End,
    Exchange,
    SmashedData,
)


def client_round(
    algorithm: Algorithm, client: Client, t: int, rehearsed: Sequence[Ask] | None, made: list[Ask]
) -> ClientRound:
    """The round of one participating client, starting from the averaged client model.

    Between two steps it holds neither a batch nor activations.

    Args:
        rehearsed: what the client has announced to ask; None: it announces its end instead.
        made: gets what it asks.

    Raises:
        InputError: a step of an algorithm of the user's own asks anything else than it announced.
    """
    batches = client.batches(t)
    asking = None if rehearsed is None else {ask.step for ask in rehearsed}

    def notice(ask: Ask) -> None:
        if rehearsed is not None:
            expected = next(iter(rehearsed[len(made) :]), None)
            # Labels are in no ledger of the rehearsal's, and a task may give them in a type of its own.
            same = expected and expected._replace(at_once=False, label_bytes=ask.label_bytes)
            if ask != same:
                raise _departure(algorithm, ask.step, ask, expected)
            ask = ask._replace(at_once=expected is not None and expected.at_once)
        made.append(ask)

    for step in range(algorithm.federation.steps(client.id)):
        if asking is None or step in asking:
            yield BeginStep(step)
        requests = algorithm.client_step(client, t, step, *next(batches))
        yield from travelling(algorithm, client, watched(algorithm, client, requests, step, notice), made)
        if rehearsed is not None and len(made) < len(rehearsed) and rehearsed[len(made)].step == step:
            raise _departure(algorithm, step, None, rehearsed[len(made)])
    if rehearsed is None:
        yield End()


def travelling(algorithm: Algorithm, client: Client, requests: ClientStep, made: list[Ask]) -> ClientStep:
    """The requests of a local step as they travel, coded; each is resumed with the decoded answer.

    Args:
        made: ends with each request as it is made; its bytes are put in once they are known.

    Raises:
        InputError: a coded change would come to an auxiliary model that the server does not know.
    """
    answer = None
    while True:
        try:
            body = requests.send(answer)
        except StopIteration:
            return
        if body.kind in TAKING_UP and client.codings.auxiliary and client.owns_auxiliary:
            raise refusal(
                algorithm,
                f"yields {type(body).__name__} for an auxiliary model that the client has trained in the "
                "same round; with comm.codec.auxiliary a change comes, of the one that the server has in use",
            )
        coded = client.encode(body, len(made) - 1)
        reply = yield coded
        if isinstance(coded, SmashedData):
            made[-1] = made[-1]._replace(smashed_bytes=coded.z.nbytes)
        if reply is not None:
            made[-1] = made[-1]._replace(answer_bytes=reply.nbytes)
        answer = client.decode(reply)


def watched(
    algorithm: Algorithm, client: Client, requests: ClientStep, step: int, notice: Callable[[Ask], None]
) -> ClientStep:
    """The requests of a local step; each is shown to `notice` before it goes out.

    Raises:
        InputError: they are none.
    """
    if not isinstance(requests, GeneratorType):
        raise refusal(algorithm, f"returns {type(requests).__name__}, expected it to yield its requests")
    answer = None
    while True:
        try:
            body = requests.send(answer)
        except StopIteration:
            return
        except NoAuxiliary:
            raise refusal(algorithm, "uses an auxiliary model, where auxiliary is 'none'") from None
        if KINDS.get(getattr(body, "kind", "")) is not type(body):
            expected = ", ".join(kind.__name__ for kind in KINDS.values())
            raise refusal(algorithm, f"yields {type(body).__name__}, expected one of {expected}")
        if algorithm.client_holds_whole_model:
            wrong = f"yields {type(body).__name__}, where client_holds_whole_model leaves no server model"
            raise refusal(algorithm, wrong)
        if not isinstance(body, SmashedData):
            if algorithm.auxiliary != "aligned":
                name = type(body).__name__
                raise refusal(algorithm, f"yields {name}, where auxiliary is {algorithm.auxiliary!r}")
            if isinstance(body, BeginAlignment) and not algorithm.keys.alignment.lag:
                raise refusal(algorithm, "yields BeginAlignment, where algorithm.alignment.lag is 0")
            weights = client.auxiliary_weights
            coded = client.codings.weights_nbytes(weights)
            answered = body.kind in TAKING_UP
            uncoded = weights.nbytes if answered else 0
            notice(Ask(step, body.kind, answer_bytes=coded if answered else 0, uncoded_bytes=uncoded))
        else:
            if not 0 < body.z.shape[0] == body.y.shape[0]:
                sizes = f"smashed data of {body.z.shape[0]} samples with {body.y.shape[0]} labels"
                raise refusal(algorithm, f"yields {sizes}, expected as many, and at least one")
            like, returned = (body.z.shape, body.z.dtype), isinstance(body, Exchange)
            up = client.codings.smashed.nbytes(*like)
            down = client.codings.gradient.nbytes(*like) if returned else 0
            uncoded = body.z.nbytes * (2 if returned else 1)
            notice(Ask(step, body.kind, body.y.shape[0], up, body.y.nbytes, down, uncoded))
        answer = yield body


def refusal(algorithm: Algorithm, wrong: str) -> InputError:
    """The user's own `client_step` is not what it should be."""
    return InputError(f"algorithm.name: got {algorithm.keys.name!r}, whose client_step {wrong}")


def _departure(algorithm: Algorithm, step: int, made: Ask | None, rehearsed: Ask | None) -> InputError:
    """The server would wait in vain, or for something else."""
    got, expected = (str(ask) if ask and ask.step == step else "nothing" for ask in (made, rehearsed))
    return refusal(
        algorithm,
        f"asks at local step {step}: {got}, expected {expected} as in its rehearsal; if that depends on "
        "values, it may say requests_depend_on_values = True",
    )
