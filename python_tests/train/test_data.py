"""Long-tailed subsets, digits, image folders and augmented views."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from train.config import DataConfig
from train.data import load_data
from train.data.augment import digit_views, photo_views
from train.data.image_folder import read_images
from train.data.labelled import Labelled
from train.data.loaders import AugmentedImages, EpochBatches, training_loader
from train.data.long_tailed import draw, long_tailed, long_tailed_counts, split_validation
from train.errors import UserError


@pytest.mark.parametrize(
    ("num_classes", "n_max", "ratio", "total"),
    [
        (10, 5000, 100, 12406),
        (10, 5000, 50, 13996),
        (10, 5000, 10, 20431),
        (100, 500, 100, 10847),
        (100, 500, 50, 12608),
        (100, 500, 10, 19573),
    ],
)
def test_counts_of_cifar_lt(num_classes, n_max, ratio, total):
    counts = long_tailed_counts(num_classes, n_max, ratio)
    assert sum(counts) == total
    assert (counts[0], counts[-1]) == (n_max, n_max // ratio)


def test_counts_of_cifar10_lt_by_class():
    expected = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert long_tailed_counts(10, 5000, 100) == expected


def test_counts_lose_no_image_to_rounding():
    assert all(long_tailed_counts(2, n, n)[-1] == 1 for n in range(1, 1000))


def test_draw_is_nested_seeded_and_bounded():
    labels = torch.arange(300) % 3
    small, small_rest = draw(labels, [5, 2, 200], seed=1)
    large, _ = draw(labels, [50, 20, 200], seed=1)
    assert set(small.tolist()) <= set(large.tolist())
    assert torch.bincount(labels[small]).tolist() == [5, 2, 100]
    assert torch.equal(torch.cat([small, small_rest]).sort().values, torch.arange(300))
    assert torch.equal(small, draw(labels, [5, 2, 200], seed=1)[0])
    assert not torch.equal(small, draw(labels, [5, 2, 200], seed=2)[0])


def test_validation_is_stratified_and_leaves_every_class_an_image():
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor([100, 12, 2, 1]))
    train, validation = split_validation(labels, 0.1, seed=0)
    assert torch.bincount(labels[train]).tolist() == [90, 11, 1, 1]
    assert torch.bincount(labels[validation], minlength=4).tolist() == [10, 1, 1, 0]
    assert set(train.tolist()).isdisjoint(validation.tolist())


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_validation_at_extreme_fractions(fraction):
    labels = torch.repeat_interleave(torch.arange(2), torch.tensor([50, 2]))
    train, validation = split_validation(labels, fraction, seed=0)
    assert torch.bincount(labels[train]).min() >= 1
    assert torch.bincount(labels[validation]).min() >= 1


def test_validation_needs_a_class_of_two():
    with pytest.raises(UserError, match="every class has one training image"):
        split_validation(torch.arange(5), 0.1, seed=0)


def test_channel_statistics():
    images = torch.randint(0, 256, (20, 3, 5, 7), dtype=torch.uint8)
    images[:, 1] //= 4
    mean, std = Labelled(images, torch.zeros(20)).channel_statistics()
    pixels = images.double() / 255
    torch.testing.assert_close(mean, pixels.mean(dim=(0, 2, 3)).float())
    torch.testing.assert_close(std, pixels.std(dim=(0, 2, 3), correction=0).float())


def test_digits():
    data = load_data(DataConfig())
    assert data.counts.tolist() == [120, 86, 61, 44, 31, 22, 16, 11, 8, 6]
    assert torch.bincount(data.test.labels).tolist() == [50] * 10
    assert len(data.train.labels) + len(data.validation.labels) == data.counts.sum()
    assert data.train.images.shape[1:] == (1, 8, 8)
    assert data.train.images.dtype == torch.uint8
    assert (int(data.train.images.min()), int(data.train.images.max())) == (0, 255)
    # The three sets share no scan; 1797 scans hold no two that are equal.
    scans = torch.cat([data.train.images, data.validation.images, data.test.images]).flatten(1)
    assert len(scans.unique(dim=0)) == len(scans)


def test_digits_depend_on_the_seed():
    first, again, other = (load_data(DataConfig(seed=s)) for s in (0, 0, 1))
    assert torch.equal(first.train.images, again.train.images)
    assert not torch.equal(first.test.images, other.test.images)


def test_ratio_that_leaves_a_class_empty():
    with pytest.raises(UserError, match=r"data.ratio 200 leaves 1 of 10 classes without an image \(9\).*at most 120"):
        load_data(DataConfig(ratio=200))


def test_long_tail_of_unequal_classes_takes_what_is_there():
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor([5, 40, 100]))
    kept = long_tailed(labels, ["a", "b", "c"], 100, DataConfig(ratio=4))
    assert torch.bincount(labels[kept]).tolist() == [5, 40, 25]


@pytest.fixture
def folder(tmp_path):
    """root/{train,test}/{cat,dog,emu}: 12 and 2 images a class, 9 wide and 7 high, each of one colour."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 2)):
        for name in ("dog", "cat", "emu"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.broadcast_to(rng.integers(0, 256, 3, dtype=np.uint8), (7, 9, 3))
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def test_image_folder(folder):
    data = load_data(DataConfig(root=str(folder), ratio=4))
    assert data.classes == ["cat", "dog", "emu"]
    assert data.counts.tolist() == [12, 6, 3]
    assert torch.bincount(data.test.labels).tolist() == [2, 2, 2]
    assert data.train.images.shape[1:] == (3, 7, 9)
    pixels = np.asarray(Image.open(folder / "test" / "cat" / "0.png"))
    assert np.array_equal(data.test.images[0].permute(1, 2, 0).numpy(), pixels)


def test_image_folder_with_a_cap(folder):
    data = load_data(DataConfig(root=str(folder), ratio=4, max_per_class=8))
    assert data.counts.tolist() == [8, 4, 2]


def test_images_are_scaled_on_request(folder):
    data = load_data(DataConfig(root=str(folder), ratio=1, image_size=6))
    assert data.train.images.shape[2:] == (6, 6)


def test_every_mode_is_read_as_rgb(tmp_path):
    paths = []
    for mode in ("L", "RGBA", "P", "1", "CMYK"):
        paths.append(str(tmp_path / f"{mode}.tiff"))
        Image.new(mode, (4, 4), 1).save(paths[-1])
    assert read_images(paths, None, 1).shape == (5, 3, 4, 4)


def test_missing_folder(tmp_path):
    with pytest.raises(UserError, match=re.escape(f"no folder {tmp_path / 'train'}; expected train/<class>/")):
        load_data(DataConfig(root=str(tmp_path)))


def test_class_without_images(folder):
    (folder / "train" / "ant").mkdir()
    with pytest.raises(UserError, match=r"train: Found no valid file for the classes ant"):
        load_data(DataConfig(root=str(folder)))


def test_classes_that_differ_between_train_and_test(folder):
    (folder / "test" / "emu").rename(folder / "test" / "fox")
    with pytest.raises(UserError, match="must have the same classes, but differ in emu, fox"):
        load_data(DataConfig(root=str(folder)))


def test_broken_images_are_named(folder):
    path = folder / "train" / "dog" / "3.png"
    whole = path.read_bytes()
    for content in (b"", b"not an image", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=re.escape(f"cannot read the image {path}")):
            load_data(DataConfig(root=str(folder), ratio=1))


def test_images_of_different_sizes(folder):
    path = folder / "train" / "dog" / "3.png"
    Image.new("RGB", (5, 6)).save(path)
    with pytest.raises(UserError, match=re.escape(f"9×7 pixels, {path} has 5×6; set data.image_size")):
        load_data(DataConfig(root=str(folder), ratio=1))


def test_images_that_do_not_fit_into_memory(folder):
    with pytest.raises(UserError, match=r"42 images of 9×7 need .* GiB of memory, data.memory_gib allows 1e-09"):
        load_data(DataConfig(root=str(folder), ratio=1, memory_gib=1e-9))


def test_torchvision_that_does_not_load(folder, monkeypatch):
    def fail(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("train.data.torchvision_import.importlib.import_module", fail)
    with pytest.raises(UserError, match=r"torchvision::nms does not exist.*same kind"):
        load_data(DataConfig(root=str(folder)))


def gray_images(n=10, size=8, channels=1):
    images = torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8)
    return Labelled(images, torch.arange(n))


def test_views_depend_on_seed_epoch_and_image_alone():
    data = gray_images()
    views = digit_views(8, 8)
    first, other_seed = (AugmentedImages(data, views, seed) for seed in (0, 1))
    a = first[3, 7]
    first[5, 2]
    torch.rand(3)
    assert all(torch.equal(x, y) for x, y in zip(a, first[3, 7], strict=True))
    same_pixels = AugmentedImages(Labelled(data.images[7:8].expand(10, -1, -1, -1), data.labels), views, 0)
    assert torch.equal(a[1], same_pixels[3, 7][1])
    for other in (first[4, 7], other_seed[3, 7], same_pixels[3, 8]):
        assert not torch.equal(a[1], other[1])


def test_every_image_of_a_batch_gets_a_draw_of_its_own():
    data = Labelled(gray_images(1).images.expand(50, -1, -1, -1), torch.zeros(50, dtype=torch.long))
    for views in (digit_views(8, 8), photo_views(8, 8)):
        dataset = AugmentedImages(data, [views.strong], 0)
        assert len(torch.stack([dataset[0, i][0] for i in range(50)]).unique(dim=0)) > 25


def test_digits_are_not_flipped_and_photographs_are():
    ramp = torch.arange(8, dtype=torch.uint8).mul(30).expand(3, 8, 8)

    def rises(view):
        return (view(ramp)[0].float() * (torch.arange(8) - 3.5)).sum() > 0

    for view in digit_views(8, 8):
        assert all(rises(view) for _ in range(100))
    assert 30 < sum(bool(rises(photo_views(8, 8).weak)) for _ in range(100)) < 70


def test_weak_view_shifts_by_at_most_an_eighth():
    image = torch.arange(64, dtype=torch.uint8).view(1, 8, 8) + 1
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1))
    crops = [padded[:, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
    weak = digit_views(8, 8).weak
    found = set()
    for _ in range(200):
        view = weak(image)
        found.add(next(k for k, crop in enumerate(crops) if torch.equal(crop, view)))
    assert found == set(range(9))


def test_batches_cover_the_epoch_in_equal_parts():
    batches = EpochBatches(num_images=130, batch_size=64, seed=0)
    epoch = list(batches)
    assert len(batches) == len(epoch) == 3
    assert sorted(map(len, epoch)) == [43, 43, 44]
    assert sorted(index for batch in epoch for _, index in batch) == list(range(130))
    batches.epoch = 1
    assert [index for batch in batches for _, index in batch] != [index for batch in epoch for _, index in batch]
    assert {e for batch in batches for e, _ in batch} == {1}


def test_workers_make_the_same_views():
    dataset = AugmentedImages(gray_images(), digit_views(8, 8), seed=0)
    here, elsewhere = (
        list(training_loader(dataset, EpochBatches(10, 4, seed=0), workers, pin_memory=False)) for workers in (0, 1)
    )
    for a, b in zip(here, elsewhere, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
