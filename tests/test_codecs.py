"""Codecs: closed forms, bounds of their errors, bytes, numbers that are not finite, and what is refused."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fslsage_rpc.config.schema import CodecKeys
from fslsage_rpc.parties.codecs import Bf16, Codec, Gaussian, Int8, Kind, Parts, TopK, create, try_out
from support.user_input import mistake

HERE = "test_codecs"
KINDS: tuple[Kind, ...] = ("smashed", "gradient", "auxiliary")
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
ARGUMENTS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "int8": {},
    "topk": {},
    "gaussian": {"clip": 1.0, "sigma": 0.5},
}
PAIRS = [(name, kind) for name in ARGUMENTS for kind in KINDS if name != "gaussian" or kind == "smashed"]


def key(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def made(name: str, kind: Kind, **arguments: Any) -> Codec:
    codec = create(CodecKeys(name=name, arguments=arguments or ARGUMENTS[name]), kind)
    assert codec is not None
    return codec


def travel(codec: Codec, x: Tensor, number: int = 0) -> Tensor:
    """Encoded by the sender, decoded by the receiver."""
    return codec.decode(codec.encode(x, key(number)), x.shape, x.dtype)


def normal(*shape: int, dtype: torch.dtype = torch.float32, number: int = 7) -> Tensor:
    return torch.randn(shape, generator=key(number), dtype=torch.float64).to(dtype)


# Closed forms


def test_bf16_keeps_eight_bits_and_is_the_identity_on_itself() -> None:
    x = torch.tensor([[1.0, 1 + 2**-7, 1 + 2**-9, -3e38]])
    assert travel(Bf16("smashed"), x)[0, :3].tolist() == [1.0, 1 + 2**-7, 1.0]
    assert travel(Bf16("smashed"), x)[0, 3] == pytest.approx(-3e38, rel=2**-8)
    mine = x.to(torch.bfloat16)
    assert torch.equal(travel(Bf16("gradient"), mine), mine)


def test_int8_by_hand() -> None:
    x = torch.tensor([[-10.0, 245.0, 0.4, 0.6], [0.0, 25.5, 0.1, 0.14]])  # steps of 1 and of 0.1
    levels, (scale, low) = Int8("gradient").encode(x, key())
    assert levels.tolist() == [[0, 255, 10, 11], [0, 255, 1, 1]]
    assert scale.tolist() == pytest.approx([1.0, 0.1])
    assert low.tolist() == [-10.0, 0.0]
    expected = [[-10.0, 245.0, 0.0, 1.0], [0.0, 25.5, 0.1, 0.1]]
    assert torch.allclose(travel(Int8("gradient"), x), torch.tensor(expected))


@pytest.mark.parametrize(
    ("kind", "shape", "group"),
    [
        ("smashed", (5, 3, 4, 4), torch.arange(3).view(1, 3, 1, 1)),  # channels
        ("smashed", (5, 7, 6), torch.arange(35).view(5, 7, 1)),  # positions
        ("smashed", (5, 6), torch.arange(5).view(5, 1)),
        ("smashed", (5, 3, 2, 2, 2), torch.arange(5).view(5, 1, 1, 1, 1)),
        ("gradient", (5, 3, 4, 4), torch.arange(5).view(5, 1, 1, 1)),
        ("gradient", (5, 7, 6), torch.arange(5).view(5, 1, 1)),
        ("auxiliary", (2500,), torch.arange(2500) // 1024),
        ("auxiliary", (2048,), torch.arange(2048) // 1024),
    ],
)
def test_groups_of_int8_share_nothing(kind: Kind, shape: tuple[int, ...], group: Tensor) -> None:
    """Where one is a million times the next, neither loses digits."""
    x, sizes, codec = normal(*shape), 2.0 ** (20 * (group % 2)), Int8(kind)
    assert codec.encode(x, key())[1].shape == (2, len(group.unique()))
    assert torch.equal(travel(codec, x * sizes), travel(codec, x) * sizes)


def test_topk_keeps_exactly_the_largest_of_each_sample() -> None:
    x = torch.tensor([[[1.0, -5.0], [3.0, 0.5]], [[0.1, 0.2], [-0.4, 0.3]]])
    kept = torch.tensor([[[0.0, -5.0], [3.0, 0.0]], [[0.0, 0.0], [-0.4, 0.3]]])
    for kind in ("smashed", "gradient"):
        assert torch.equal(travel(TopK(kind, share=0.5), x), kept)
    assert torch.equal(travel(TopK("auxiliary", share=0.25), x.flatten()), (x * (x.abs() >= 3)).flatten())


@given(st.integers(1, 400), st.floats(0.001, 1))
def test_topk_keeps_its_share_of_any_size(size: int, share: float) -> None:
    x = torch.randperm(size, generator=key()) + 1.0  # no two alike
    kept = max(1, round(share * size))
    assert torch.equal(travel(TopK("auxiliary", share), x), torch.where(x > size - kept, x, 0))


@pytest.mark.parametrize(
    ("size", "kind"),
    [
        (256, torch.uint8),
        (257, torch.int16),
        (2**15, torch.int16),
        (2**15 + 1, torch.int32),
    ],
)
def test_places_take_the_smallest_integers_that_hold_them(size: int, kind: torch.dtype) -> None:
    x = torch.zeros(size)
    x[-1] = 2
    values, places = TopK("auxiliary", 1e-6).encode(x, key())
    assert (values.tolist(), places.tolist(), places.dtype) == ([[2.0]], [[size - 1]], kind)
    assert torch.equal(travel(TopK("auxiliary", 1e-6), x), x)


def test_gaussian_bounds_each_samples_norm() -> None:
    x = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    expected = torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]])
    assert torch.allclose(travel(Gaussian("smashed", clip=1, sigma=0), x), expected)


def test_gaussian_noise_has_its_deviation_whatever_the_numbers() -> None:
    count = 40_000
    for x in (torch.zeros(4, 10_000), torch.full((4, 10_000), 1e-3)):
        noise = travel(Gaussian("smashed", clip=10, sigma=0.5), x) - x
        assert abs(noise.mean().item()) < 5 * 0.5 / math.sqrt(count)  # five standard errors
        assert noise.std().item() == pytest.approx(0.5, rel=5 / math.sqrt(2 * count))


# Errors


@given(
    st.sampled_from(DTYPES),
    st.sampled_from(KINDS),
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.integers(-12, 12),
    st.integers(-3, 3),
    st.booleans(),
)
def test_int8_errs_by_half_a_step_at_most(
    dtype: torch.dtype, kind: Kind, sizes: list[int], exponent: int, offset: int, stochastic: bool
) -> None:
    shape = (math.prod(sizes),) if kind == "auxiliary" else (3, *sizes)
    x = (normal(*shape, dtype=torch.float64) * 10.0**exponent + offset).to(dtype)
    codec = Int8(kind, stochastic)
    scale = codec.encode(x, key())[1][0].max().item()
    rounding = 2 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps + torch.finfo(dtype).eps
    bound = scale * (1 if stochastic else 0.5) * 1.001 + rounding * x.abs().max().item()
    assert (travel(codec, x).double() - x.double()).abs().max().item() <= bound


def test_stochastic_rounding_is_unbiased_and_keyed() -> None:
    draws = 4000
    x = torch.tensor([[0.0, 255.0, 10.25, 10.5, 77.9, 254.999]])  # steps of 1
    codec = Int8("gradient", stochastic=True)
    seen = torch.cat([travel(codec, x, number) for number in range(draws)])
    assert ((seen == x.floor()) | (seen == x.ceil())).all()
    # A number's error has a deviation of half a step at most, their mean that over the root of the draws.
    assert (seen.mean(0) - x[0]).abs().max().item() < 5 * 0.5 / math.sqrt(draws)
    assert torch.equal(travel(codec, x, 3), travel(codec, x, 3))
    assert not torch.equal(travel(codec, normal(4, 9), 3), travel(codec, normal(4, 9), 4))


@pytest.mark.parametrize("name", ["bf16", "int8", "topk"])
def test_gradients_of_a_mean_over_many_samples_keep_their_relative_error(name: str) -> None:
    """A cut-layer gradient of a mean over B samples has a factor of 1 / B, and so has its error."""
    gradients = normal(1000, 64) * torch.logspace(-3, 0, 1000)[:, None]  # some samples are learnt already
    codec = made(name, "gradient")

    def relative_errors(batch: int) -> Tensor:
        g = gradients[-batch:] / batch
        return (travel(codec, g) - g).norm(dim=1) / g.norm(dim=1)

    few, many = relative_errors(8), relative_errors(1000)
    assert many[-8:].mean().item() == pytest.approx(few.mean().item(), rel=0.1)
    # Half a step of bf16; of int8, 1 / 510 of the range; of topk, what a tenth of normal numbers leaves out.
    assert many.max().item() < {"bf16": 2**-8, "int8": 0.02, "topk": 0.9}[name]


def test_a_constant_group_is_exact() -> None:
    for value in (0.1, -3e38, 1e-40, 0.0):
        for kind, shape in (("smashed", (3, 2, 2, 2)), ("gradient", (3, 5)), ("auxiliary", (1500,))):
            x = torch.full(shape, value)
            for stochastic in (False, True):
                assert torch.equal(travel(Int8(kind, stochastic), x), x)  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("name", "kind"), PAIRS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_seen(name: str, kind: Kind, number: float, dtype: torch.dtype) -> None:
    shape = (2000,) if kind == "auxiliary" else (4, 3, 5, 5)
    x = normal(*shape, dtype=dtype)
    x.view(-1)[-1] = number
    decoded = travel(made(name, kind), x)
    last = decoded.view(-1)[-1].item()
    assert math.isnan(last) or last == number
    if name == "int8":  # the last group, and no other
        places: dict[str, Any] = {
            "smashed": (slice(None), -1),
            "gradient": -1,
            "auxiliary": slice(1024, None),
        }
        group = decoded[places[kind]]
        assert math.isnan(last)
        assert group.isnan().all()
        assert decoded.isnan().sum().item() == group.numel()


def test_a_range_that_is_no_number_is_none() -> None:
    assert travel(Int8("gradient"), torch.tensor([[-3e38, 3e38]])).isnan().all()


# Bytes


@given(
    st.sampled_from(DTYPES),
    st.sampled_from(PAIRS),
    st.integers(1, 5000),
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
)
def test_bytes_are_those_of_the_parts(
    dtype: torch.dtype, pair: tuple[str, Kind], n: int, sizes: list[int]
) -> None:
    name, kind = pair
    codec = made(name, kind)
    x = normal(*((n,) if kind == "auxiliary" else (2, *sizes)), dtype=dtype)
    parts = codec.encode(x, key())
    assert codec.nbytes(x.shape, dtype) == sum(part.nbytes for part in parts)
    assert all(part.untyped_storage().nbytes() == part.nbytes for part in parts)  # nothing hides behind them
    decoded = codec.decode(parts, x.shape, dtype)
    assert (decoded.shape, decoded.dtype) == (x.shape, dtype)


def test_bytes_by_hand() -> None:
    z, weights = torch.Size((256, 128, 4, 4)), torch.Size((5130,))
    numbers = 256 * 128 * 16
    assert Bf16("smashed").nbytes(z, torch.float32) == 2 * numbers
    assert Int8("smashed").nbytes(z, torch.float32) == numbers + 128 * 8
    assert Int8("gradient").nbytes(z, torch.float64) == numbers + 256 * 16
    assert Int8("auxiliary").nbytes(weights, torch.float32) == 5130 + 6 * 8
    assert TopK("gradient").nbytes(z, torch.float32) == 256 * 205 * (4 + 2)
    assert TopK("auxiliary").nbytes(weights, torch.bfloat16) == 513 * (2 + 2)
    assert Gaussian("smashed", 1.0, 1.0).nbytes(z, torch.float32) == 4 * numbers


# What a configuration asks for


def test_none_is_no_codec() -> None:
    assert create(CodecKeys(), "smashed") is None
    said = mistake(create, CodecKeys(name="none", arguments={"share": 1}), "gradient")
    assert said == "comm.codec.gradient.arguments: got {share: 1}, expected {}: none takes none"


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_the_built_in_ones_are_what_a_users_own_has_to_be(name: str, kind: Kind) -> None:
    """Named as a user's own, they pass its trial."""
    kinds = {"bf16": Bf16, "int8": Int8, "topk": TopK, "gaussian": Gaussian}
    own = CodecKeys(name=f"fslsage_rpc.parties.codecs:{kinds[name].__name__}", arguments=ARGUMENTS[name])
    assert type(create(own, kind)) is type(made(name, kind)) is kinds[name]


NEEDS = "expected a value for clip and sigma, which gaussian needs"


@pytest.mark.parametrize(
    ("name", "kind", "arguments", "line"),
    [
        ("topk", "gradient", {"share": 0}, ".arguments.share: got 0, expected a number > 0 and <= 1"),
        ("topk", "smashed", {"share": 1.5}, ".arguments.share: got 1.5, expected a number > 0 and <= 1"),
        ("gaussian", "smashed", {}, f".arguments: got {{}}, {NEEDS}"),
        ("gaussian", "smashed", {"clip": 0, "sigma": 1}, ".arguments.clip: got 0, expected a number > 0"),
        ("gaussian", "smashed", {"clip": 1, "sigma": -1}, ".arguments.sigma: got -1, expected a number >= 0"),
        ("gaussian", "gradient", {"clip": 1, "sigma": 1}, ": got 'gaussian', which is for smashed data only"),
        ("int8", "smashed", {"stochastic": 1}, ".arguments.stochastic: got 1, expected true or false"),
        (
            "bf16",
            "auxiliary",
            {"share": 0.5},
            ".arguments.share: unknown argument of bf16; it takes none: set "
            "comm.codec.auxiliary.arguments={}",
        ),
        (
            "int8",
            "smashed",
            {"kind": "gradient"},
            ".arguments.kind: got 'gradient', expected none: int8 is given it anyway",
        ),
    ],
)
def test_arguments_are_checked(name: str, kind: Kind, arguments: dict[str, Any], line: str) -> None:
    said = mistake(create, CodecKeys(name=name, arguments=arguments), kind)
    assert said == f"comm.codec.{kind}{line}"


# A user's own


class Plain(Codec):
    """Sends what it is given."""

    def encode(self, x: Tensor, generator: torch.Generator) -> Parts:
        return (x,)

    def decode(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return parts[0]

    def nbytes(self, shape: torch.Size, dtype: torch.dtype) -> int | None:
        return None


class Scaled(Plain):
    def __init__(self, kind: Kind, by: int):
        super().__init__(kind)
        if by == 0:
            raise ValueError("by 0")
        self.by = by


class Miscounting(Plain):
    def nbytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        return 4


class Listing(Plain):
    def encode(self, x: Tensor, generator: torch.Generator) -> Any:
        return [x]


class Flat(Plain):
    def decode(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return parts[0].flatten()


class Double(Plain):
    def decode(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return parts[0].double()


class Silent(Plain):
    def decode(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> Any:
        return None


class Unkeyed(Plain):
    def encode(self, x: Tensor, generator: torch.Generator) -> Parts:
        return (x + torch.rand_like(x),)


class Spoiling(Plain):
    def encode(self, x: Tensor, generator: torch.Generator) -> Parts:
        return (x.mul_(2),)


class SpoilingParts(Plain):
    def encode(self, x: Tensor, generator: torch.Generator) -> Parts:
        return (x / 2,)

    def decode(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return parts[0].mul_(2)


class Failing(Plain):
    def encode(self, x: Tensor, generator: torch.Generator) -> Parts:
        raise RuntimeError("too\nlong")


class Unfinished(Codec):
    def encode(self, x: Tensor, generator: torch.Generator) -> Parts:
        return (x,)


ON = "for torch.float32 [2, 3, 4, 4]"
DRAWN = "which decodes to other numbers the second time: draws come from encode's generator"


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (Miscounting, f"whose nbytes is 4 {ON}, where the parts have 384 bytes"),
        (Listing, f"whose encode gives list {ON}, expected a tuple of tensors"),
        (Flat, f"whose decode gives torch.float32 [96] {ON}"),
        (Double, f"whose decode gives torch.float64 [2, 3, 4, 4] {ON}"),
        (Silent, f"whose decode gives NoneType {ON}, expected a tensor"),
        (Unkeyed, DRAWN),
        (Spoiling, "whose encode changes the tensor that it is given"),
        (SpoilingParts, DRAWN),
        (Failing, "which fails on torch.float32 [2, 3, 4, 4] (RuntimeError: too)"),
        (Unfinished, "which lacks decode, nbytes"),
        (CodecKeys, "expected a subclass of fslsage_rpc.parties.codecs.Codec"),
    ],
)
def test_what_is_no_codec_is_refused(own: type, words: str) -> None:
    name = f"{HERE}:{own.__name__}"
    said = mistake(try_out, CodecKeys(name=name), "smashed", torch.Size([2, 3, 4, 4]), torch.float32)
    assert said == f"comm.codec.smashed: got {name!r}, {words}"


def test_a_users_own_has_arguments() -> None:
    name, key = f"{HERE}:Scaled", "comm.codec.auxiliary"
    own = create(CodecKeys(name=name, arguments={"by": 3}), "auxiliary")
    assert isinstance(own, Plain)
    assert (own.kind, getattr(own, "by", None)) == ("auxiliary", 3)
    said = mistake(create, CodecKeys(name=name, arguments={"by": "3"}), "auxiliary")
    assert said == f"{key}.arguments.by: got '3', expected an integer"
    said = mistake(create, CodecKeys(name=name, arguments={"by": 0}), "auxiliary")
    assert said == f"{key}: got {name!r}, which fails (ValueError: by 0)"
    said = mistake(create, CodecKeys(name="nowhere:Codec"), "auxiliary")
    assert said.startswith(f"{key}: got 'nowhere:Codec', which cannot be imported (ModuleNotFoundError")
