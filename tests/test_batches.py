"""Batches: sizes, order, normalisation and augmentation, each against its closed form."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fslsage_rpc.data.batches import ImageBatches, batch_sizes
from fslsage_rpc.data.datasets import SPECS, LabelledImages, Spec
from fslsage_rpc.randomness import torch_stream


def numbered(spec: Spec, samples: int) -> LabelledImages:
    """Random images whose labels are their numbers."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, spec.pixel_maximum + 1, (samples, *spec.image_shape), dtype=np.uint8)
    return LabelledImages(torch.from_numpy(images), torch.arange(samples))


def batches_of(
    name: str, samples: int, batch_size: int, dtype: torch.dtype = torch.float64
) -> tuple[LabelledImages, ImageBatches]:
    data = numbered(SPECS[name], samples)
    return data, ImageBatches(data, SPECS[name], batch_size, torch.device("cpu"), dtype)


def normalised(images: np.ndarray, spec: Spec) -> np.ndarray:
    """(pixel / maximum - mean) / std per channel of `[..., C, H, W]`, in double precision."""
    mean, std = (np.array(numbers)[:, None, None] for numbers in (spec.mean, spec.std))
    return (images / spec.pixel_maximum - mean) / std


@given(st.integers(1, 500), st.integers(1, 100), st.integers(1, 4))
def test_every_pass_is_whole_batches_and_then_the_rest(samples: int, batch_size: int, epochs: int) -> None:
    one_pass = [min(batch_size, samples - first) for first in range(0, samples, batch_size)]
    assert batch_sizes(samples, batch_size, epochs) == one_pass * epochs


@pytest.mark.parametrize("name", sorted(SPECS))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_batches_in_order_are_the_normalised_images(name: str, dtype: torch.dtype, tolerance: float) -> None:
    data, in_fours = batches_of(name, 10, 4, dtype)
    batches = list(in_fours.in_order())
    assert [(len(x), len(y)) for x, y in batches] == [(4, 4), (4, 4), (2, 2)]
    assert all(x.dtype == dtype and y.dtype == torch.int64 for x, y in batches)
    assert torch.cat([y for _, y in batches]).tolist() == list(range(10))
    images = torch.cat([x for x, _ in batches]).numpy()
    assert images.shape == data.images.shape
    assert np.abs(images - normalised(data.images.numpy(), SPECS[name])).max() <= tolerance


@pytest.mark.parametrize("augment", [False, True])
def test_every_epoch_holds_every_sample_once_in_an_order_of_its_own(augment: bool) -> None:
    _, batches = batches_of("digits", 50, 16, torch.float32)
    pairs = list(batches.shuffled(0, 1, 2, 3, augment))
    assert [len(y) for _, y in pairs] == batch_sizes(50, 16, 3)
    assert all(x.shape == (len(y), 1, 8, 8) and x.dtype == torch.float32 for x, y in pairs)
    epochs = torch.cat([y for _, y in pairs]).view(3, 50).tolist()
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_unaugmented_batches_hold_the_normalised_images_of_their_labels() -> None:
    data, batches = batches_of("cifar10", 9, 4)
    for x, y in batches.shuffled(0, 0, 0, 1, augment=False):
        expected = normalised(data.images[y].numpy(), SPECS["cifar10"])
        assert np.abs(x.numpy() - expected).max() <= 1e-13


@pytest.mark.parametrize("name", ["cifar10", "mnist", "digits"])
def test_augmentation_is_a_crop_of_the_padded_image_and_a_flip_where_allowed(name: str) -> None:
    spec, samples, epochs = SPECS[name], 23, 2
    data, batches = batches_of(name, samples, 5)
    height, width = spec.image_shape[1:]
    x, y = (torch.cat(t) for t in zip(*batches.shuffled(7, 3, 1, epochs, augment=True), strict=True))
    around = [(0, 0), (0, 0), (spec.crop_padding,) * 2, (spec.crop_padding,) * 2]
    padded = np.pad(data.images.numpy(), around)
    chance = torch_stream(7, "augment", t=3, client=1)
    flips = 0
    for epoch in range(epochs):
        corners = torch.randint(2 * spec.crop_padding + 1, (samples, 2), generator=chance).tolist()
        coins = torch.rand(samples, generator=chance).tolist()
        for i, ((top, left), coin) in enumerate(zip(corners, coins, strict=True), epoch * samples):
            crop = padded[y[i], :, top : top + height, left : left + width]
            if spec.flip and coin < 0.5:
                crop = crop[:, :, ::-1]
                flips += 1
            assert np.abs(x[i].numpy() - normalised(crop, spec)).max() <= 1e-13
    assert (0 < flips < samples * epochs) == spec.flip


def one_epoch(
    seed: int, t: int, client: int, augment: bool = True, batch_size: int = 16
) -> tuple[list[int], Tensor]:
    """The order of one epoch of 40 numbered images, and the images as they came, by number."""
    _, batches = batches_of("cifar10", 40, batch_size)
    pairs = batches.shuffled(seed, t, client, 1, augment)
    images, numbers = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
    return numbers.tolist(), images[numbers.argsort()]


def test_order_and_augmentation_follow_from_seed_round_and_client_alone() -> None:
    order, images = one_epoch(1, 2, 3)
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    again_order, again_images = one_epoch(1, 2, 3)
    assert order == again_order
    assert torch.equal(images, again_images)
    for other in ((9, 2, 3), (1, 9, 3), (1, 2, 9), (2, 1, 3), (1, 3, 2)):
        other_order, other_images = one_epoch(*other)
        assert order != other_order
        assert not torch.equal(images, other_images)


def test_the_order_depends_neither_on_augmentation_nor_on_the_batch_size() -> None:
    order = one_epoch(1, 2, 3)[0]
    assert one_epoch(1, 2, 3, augment=False)[0] == order
    assert all(one_epoch(1, 2, 3, batch_size=size)[0] == order for size in (1, 7, 64))


def test_batches_leave_the_stored_images_and_the_global_generator_alone() -> None:
    data, batches = batches_of("cifar10", 12, 5)
    before, state = data.images.clone(), torch.get_rng_state()
    assert len(list(batches.shuffled(0, 0, 0, 1, augment=True))) == len(list(batches.in_order())) == 3
    assert torch.equal(data.images, before)
    assert torch.equal(torch.get_rng_state(), state)
