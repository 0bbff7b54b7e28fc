"""Which batches a loader gives, whoever reads the images."""

import tempfile

import conftest
import numpy as np
import pytest
import torch
from test_folder import GREY, make_folder

from support import loaders, processes
from support.folder import ImageFolder, open_folder
from support.loaders import Augmented, Batches, make_loaders, number_of_workers
from support.options import one_line_errors, train_parser

CONFIG = {
    "dataset": "folder",
    "batch_size": 4,
    "crop": (8, 8),
    "augment": True,
    "seed": 5,
    "workers": 0,
}
HUGE = 2**17  # a square of as many rows and columns of bytes is 16 GiB


@pytest.fixture
def data(tmp_path):
    """A folder of twelve grey images of noise and their masks."""
    return make_folder(tmp_path / "data", 12, size=(16, 16), channels=1)


def training_images(data, epochs=(1,), **config) -> list[bytes]:
    """The images that a process gets in some epochs, cropped and flipped, in their order."""
    loader = make_loaders(open_folder(data, seed=5), {**CONFIG, **config})["train"]
    images = []
    for epoch in epochs:
        loader.batch_sampler.set_epoch(epoch)
        for batch, _ in loader:
            for image in batch:
                images.append(image.numpy().tobytes())
    return images


def set_processes(monkeypatch, count: int, rank: int):
    monkeypatch.setattr(processes, "world_size", lambda: count)
    monkeypatch.setattr(processes, "rank", lambda: rank)


def test_any_number_of_workers_gives_the_same_crops_and_flips_in_the_same_order(data):
    """Workers are kept, and learn of each epoch. The random numbers of dropout stay the same, too."""
    random = torch.get_rng_state()
    expected = training_images(data, epochs=(1, 2))
    assert len(set(expected)) == 2 * 10
    assert training_images(data, epochs=(1, 2), workers=2) == expected
    assert training_images(data, epochs=(2,)) == expected[10:]
    assert torch.equal(torch.get_rng_state(), random)


def test_two_processes_share_out_the_images_that_one_has(data, monkeypatch):
    expected = training_images(data)
    set_processes(monkeypatch, 2, 0)
    seen = training_images(data)
    set_processes(monkeypatch, 2, 1)
    seen += training_images(data)
    assert sorted(seen) == sorted(expected)


def test_a_process_without_an_image_of_the_last_batch_gets_one_that_does_not_count(data, monkeypatch):
    set_processes(monkeypatch, 3, 2)
    sizes = []
    for share in Batches(10, 4, seed=5):
        sizes.append(len(share))
    assert sizes == [1, 1, 1]
    ignored = []
    for _, masks in make_loaders(open_folder(data, seed=5), CONFIG)["train"]:
        ignored.append(bool((masks == 255).all()))
    assert ignored == [False, False, True]


# Crops, flips and turns

def as_pair(image, mask):
    """An image (H,W) of 16 bits and a mask, as a data set gives them."""
    return torch.from_numpy(image.astype(np.uint16))[None], torch.from_numpy(mask)


MATCHING = as_pair(GREY, GREY // 100)  # the mask tells where its pixels come from


@pytest.mark.parametrize("size", [(8, 8), (6, 10)])
def test_crops_and_turns_keep_image_and_mask_together(size):
    data = Augmented([MATCHING], [1], size, augment=True, seed=0)
    different = set()
    for epoch in range(40):
        image, mask = data[epoch, 0, True]
        assert image[0].shape == size
        assert torch.equal(image[0].int() // 100, mask.int())
        assert image.untyped_storage().nbytes() == 2 * size[0] * size[1]  # no view of all, which a worker would send
        different.add(image.numpy().tobytes())
    assert len(different) > 30


def test_a_whole_image_is_flipped_in_all_four_ways():
    data = Augmented([MATCHING], [1], None, augment=True, seed=0)
    seen = set()
    for epoch in range(40):
        image, _ = data[epoch, 0, True]
        seen.add(image.byte().numpy().tobytes())
    upside_down = GREY[::-1]
    expected = set()
    for array in (GREY, GREY[:, ::-1], upside_down, upside_down[:, ::-1]):
        expected.add(array.tobytes())
    assert seen == expected


def test_windows_are_those_of_their_image_and_fall_everywhere():
    """All pixels of the second image are 7."""
    data = Augmented([MATCHING, as_pair(np.full((12, 20), 7), GREY)], [3, 2], (12, 5), augment=False, seed=0)
    assert len(data) == 5
    columns = set()
    for epoch in range(40):
        for i in range(5):
            window, _ = data[epoch, i, True]
            assert bool((window == 7).all()) == (i >= 3)
            if i < 3:
                columns.add(tuple(window[0, :, 0].tolist()))
    assert columns == {tuple(GREY[:, left].tolist()) for left in range(16)}


def test_an_item_that_does_not_count_has_no_pixel_that_does_whatever_the_type_of_its_mask():
    images = Augmented([as_pair(GREY, GREY > 99)], [1], None, augment=False, seed=0)
    _, mask = images[1, 0, True]
    assert torch.equal(mask, torch.from_numpy(GREY > 99))
    _, mask = images[1, 0, False]
    assert (mask == 255).all()


def test_a_whole_image_that_is_not_flipped_is_not_copied():
    image, mask = torch.zeros(1, 4, 4), torch.zeros(4, 4)
    images = Augmented([(image, mask)], [1], crop=None, augment=False, seed=0)
    found, found_mask = images[1, 0, True]
    assert found.data_ptr() == image.data_ptr()
    assert found_mask.data_ptr() == mask.data_ptr()


def test_a_window_of_a_mapped_array_is_all_that_is_read(tmp_path):
    """Image and mask claim 4 and 8 GiB, in files with holes: whoever reads one fails or takes minutes."""
    shape = HUGE, HUGE // 4
    np.lib.format.open_memmap(tmp_path / "image.npy", "w+", np.uint8, shape)
    np.lib.format.open_memmap(tmp_path / "mask.npy", "w+", np.int16, shape)
    whole = ImageFolder([(tmp_path / "image.npy", tmp_path / "mask.npy")])
    image, mask = Augmented(whole, [1], (32, 48), augment=True, seed=0)[1, 0, True]
    assert mask.shape == (32, 48)


# What a worker cannot read, and how many there are

@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_vanishes_during_training_is_one_line(workers, data, capsys):
    splits = open_folder(data, seed=5)
    image, _ = splits["train"].pairs[3]
    image.unlink()
    config = {**CONFIG, "workers": workers}
    with pytest.raises(SystemExit, match="2"):
        with one_line_errors(train_parser()):
            list(make_loaders(splits, config)["train"])
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{image}: cannot be read" in said
    assert "Traceback" not in said


def test_there_is_a_worker_for_each_core_but_at_most_four_and_none_for_synthetic_images(monkeypatch):
    monkeypatch.setattr(loaders, "MOST_WORKERS", conftest.MOST_WORKERS)  # as outside of the tests
    monkeypatch.setattr(loaders.os, "cpu_count", lambda: 3)
    config = {**CONFIG, "workers": None}
    assert number_of_workers(config) == 3
    assert number_of_workers({**config, "workers": 7}) == 7
    assert number_of_workers({**config, "dataset": "synthetic"}) == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert number_of_workers(config) == 1
    monkeypatch.setattr(loaders.os, "cpu_count", lambda: 64)
    assert number_of_workers(config) == 4


def test_there_is_none_where_a_long_path_of_tmpdir_would_let_it_wait_for_ever(monkeypatch):
    monkeypatch.setattr(tempfile, "gettempdir", lambda: 80 * "t")
    assert number_of_workers({**CONFIG, "workers": 2}) == 0
