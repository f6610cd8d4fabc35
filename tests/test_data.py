"""Data: disjoint splits, the demo set, timm's specs, unreadable images."""

from __future__ import annotations

import pickle
import random
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from edge_ibtm.config import AugmentSection, DataSection
from edge_ibtm.data import View, load_data, split_indices, transform_of, view_of
from edge_ibtm.data_sources import demo_source, fingerprint, open_sources
from edge_ibtm.errors import UsageError
from edge_ibtm.finetune_data import Plan, sample_batches

VIEW = View(img_size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def write_images(root: Path, classes: tuple[str, ...] = ("ant", "bee"), count: int = 8) -> Path:
    """A folder of class folders with one-colour images: class i has the red value 50 i."""
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (40, 40), (50 * label, i, 0)).save(root / name / f"{i}.png")
    return root


def small(source: Path | str | None, **options: object) -> DataSection:
    """A section for few images."""
    return DataSection.model_validate({"source": source and str(source), "calibration_images": 2, **options})


def test_demo_parts_do_not_overlap_in_content() -> None:
    data = load_data(None, VIEW)
    parts = [
        {data.train.source.read(i)[0].tobytes() for i in part.indices} for part in (data.train, data.calibration, data.test)
    ]
    assert [len(p) for p in parts] == [len(data.train), len(data.calibration), len(data.test)]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    assert data.class_names == tuple("0123456789") and demo_source().size == 1797


def test_splits_depend_on_the_seed_only() -> None:
    spec = DataSection()
    assert split_indices(spec, 500, None, 0) == split_indices(spec, 500, None, 0)
    assert split_indices(spec, 500, None, 0) != split_indices(spec, 500, None, 1)
    train, calibration, test = split_indices(spec, 500, None, 0)
    assert sorted(train + calibration + test) == list(range(500))


def test_folder_is_normalised_and_labelled(tmp_path: Path) -> None:
    data = load_data(small(write_images(tmp_path / "d")), VIEW)
    assert data.class_names == ("ant", "bee")
    for image, label in (data.test[i] for i in range(len(data.test))):
        assert image.shape == (3, 32, 32)
        assert image[0].mean().item() == pytest.approx((50 * label / 255 - 0.5) / 0.5, abs=1e-5)


def test_own_test_split_is_used_and_shares_labels(tmp_path: Path) -> None:
    write_images(tmp_path / "train")
    (tmp_path / "val" / "bee").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(tmp_path / "val" / "bee" / "0.png")
    data = load_data(small(tmp_path), VIEW)
    assert len(data.test) == 1 and data.test[0][1] == 1
    assert len(data.train) + len(data.calibration) == 16


def test_test_classes_that_training_lacks_are_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "train")
    write_images(tmp_path / "val", ("ant", "cow"), 1)
    (tmp_path / "val" / ".cache").mkdir()
    with pytest.raises(UsageError, match="do not have: cow$"):
        load_data(small(tmp_path), VIEW)
    (tmp_path / "val" / "cow").rename(tmp_path / "val" / "bee")
    assert load_data(small(tmp_path), VIEW).class_names == ("ant", "bee")


def test_a_link_to_nothing_stops_only_where_it_is_an_image(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "d")
    before = fingerprint(small(folder))
    (folder / "readme.txt").symlink_to("gone")
    assert fingerprint(small(folder)) != before and load_data(small(folder), VIEW).class_names == ("ant", "bee")
    (folder / "bee" / "3.png").unlink()
    (folder / "bee" / "3.png").symlink_to("gone")
    with pytest.raises(UsageError, match=r"bee/3\.png cannot be read"):
        load_data(small(folder), VIEW)


def test_tar_of_class_folders(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "d")
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        tar.add(folder, arcname=".")
    assert load_data(small(tmp_path / "d.tar"), VIEW).class_names == ("ant", "bee")


@pytest.mark.parametrize("packed", [False, True])
def test_images_of_all_formats_count(tmp_path: Path, packed: bool) -> None:
    """A class whose images timm's reader does not look for would be gone, and the others numbered anew."""
    folder = write_images(tmp_path / "d", ("ant", "bee", "cow"))
    for path, suffix in zip(sorted((folder / "bee").iterdir()), (".webp", ".bmp", ".tif", ".TIFF", ".JFIF"), strict=False):
        Image.open(path).save(path.with_suffix(suffix), format="JPEG" if suffix == ".JFIF" else None)
        path.unlink()
    if packed:
        with tarfile.open(tmp_path / "d.tar", "w") as tar:
            tar.add(folder, arcname=".")
        folder = tmp_path / "d.tar"
    source, _ = open_sources(small(folder))
    assert source.class_names == ("ant", "bee", "cow") and source.size == 24
    assert [source.read(i)[1] for i in range(source.size)] == [0] * 8 + [1] * 8 + [2] * 8


def test_corrupt_image_is_named(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "d")
    victim = folder / "bee" / "3.png"
    victim.write_bytes(victim.read_bytes()[:60])
    with pytest.raises(UsageError, match=r"bee/3\.png.*repair or remove"):
        load_data(small(folder), VIEW)


def test_an_image_that_rgb_would_cut_off_is_refused(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "d")
    Image.new("I;16", (8, 8), 40_000).save(folder / "bee" / "3.png")
    with pytest.raises(UsageError, match=r"bee/3\.png cannot be read \(mode I;16 has more than 8 bits"):
        load_data(small(folder), VIEW)


def test_unreadable_data_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_images(tmp_path / "one", ("ant",))
    for source, message in (
        (tmp_path / "missing", "no data at"),
        (tmp_path / "empty", "0 images"),
        (tmp_path / "one", "1 class"),
        (Path(__file__), "not a .tar"),
        ("torch/cifar10", "data.root"),
    ):
        with pytest.raises(UsageError, match=message):
            load_data(small(source, root=str(tmp_path)), VIEW)


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="calibration_images"):
        load_data(DataSection(source=str(write_images(tmp_path / "d", count=2)), calibration_images=50), VIEW)


def test_fingerprint_changes_with_the_files(tmp_path: Path) -> None:
    spec = small(write_images(tmp_path / "d"))
    before = fingerprint(spec)
    assert before == fingerprint(spec)
    Image.new("RGB", (8, 8)).save(tmp_path / "d" / "ant" / "new.png")
    assert fingerprint(spec) != before
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\n")
    mapped = spec.model_copy(update={"class_map": str(names)})
    before = fingerprint(mapped)
    names.write_text("bee\nant\n")
    assert fingerprint(mapped) != before


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "d")
    (tmp_path / "names.txt").write_text("bee\nant\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    spec = DataSection(source="~/d", root="~/cache", class_map="~/names.txt", calibration_images=2)
    assert (spec.root, spec.class_map) == (str(tmp_path / "cache"), str(tmp_path / "names.txt"))
    assert load_data(spec, VIEW).class_names == ("bee", "ant")


def test_view_is_timms_configuration() -> None:
    view = view_of("mobilevit_s", 96)
    assert (view.img_size, view.mean, view.crop_pct) == (96, (0.0, 0.0, 0.0), 0.9)


def test_the_data_section_overrides_the_models_view(tmp_path: Path) -> None:
    source = str(write_images(tmp_path / "d"))
    asked = DataSection(source=source, calibration_images=2, mean=(0.1, 0.2, 0.3), std=(1, 2, 4), interpolation="bilinear")
    data, plain = load_data(asked, VIEW), load_data(DataSection(source=source, calibration_images=2), VIEW)
    assert (data.mean, data.std, plain.mean) == ((0.1, 0.2, 0.3), (1.0, 2.0, 4.0), VIEW.mean)
    raw = plain.test[0][0] * 0.5 + 0.5
    wanted = (raw - torch.tensor(data.mean).view(3, 1, 1)) / torch.tensor(data.std).view(3, 1, 1)
    torch.testing.assert_close(data.test[0][0], wanted)


def test_training_images_are_augmented_and_test_images_are_not() -> None:
    data = load_data(None, VIEW)
    assert torch.equal(data.test[0][0], data.test[0][0])
    assert any(not torch.equal(data.train[0][0], data.train[0][0]) for _ in range(5))


def test_stream_is_held_in_memory_up_to_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm.data

    def stream(name: str, **options: object) -> object:
        base = 0 if options["split"] == "train" else 100
        return ((Image.new("RGB", (8, 8), (base + i, 0, 0)), i % 3) for i in range(60))

    monkeypatch.setattr(timm.data, "create_dataset", stream)
    with pytest.raises(UsageError, match="train_images=N"):
        load_data(small("wds/somewhere"), VIEW)
    data = load_data(small("wds/somewhere", train_images=10, test_images=5), VIEW)
    assert (len(data.train), len(data.calibration), len(data.test), data.num_classes) == (10, 2, 5, 3)
    reds = {data.test.source.read(i)[0].getpixel((0, 0))[0] for i in data.test.indices}
    assert reds <= set(range(100, 105))


def test_statistics_see_the_same_unaugmented_images_every_time(tmp_path: Path) -> None:
    data = load_data(small(write_images(tmp_path / "d", count=6)), VIEW)

    def shown() -> torch.Tensor:
        return torch.cat([images for images, _ in sample_batches(data.train, Plan(len(data.train), 4), 8)])

    first = shown()
    random.seed(123)
    torch.manual_seed(123)
    assert torch.equal(first, shown())
    plain = [data.train.unaugmented[i][0] for i in range(len(data.train))]
    assert all(any(torch.equal(image, one) for one in plain) for image in first)
    assert data.test.unaugmented is data.test


def test_data_without_a_plain_view_are_augmented_alike_every_time() -> None:
    class Noisy(Dataset):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return torch.rand(3, 4, 4) + random.random(), index % 2

    first, second = ([images for images, _ in sample_batches(Noisy(), Plan(8, 4), 8)] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("policy", ["rand-m10-n9-inc1", "v0", "augmix-m10"])
def test_posterizing_keeps_at_least_one_bit(policy: str) -> None:
    transform = transform_of(VIEW, AugmentSection(auto_augment=policy))
    image = Image.fromarray(torch.randint(0, 256, (20, 20, 3), dtype=torch.uint8).numpy())
    (step,) = [s for s in transform.transforms if hasattr(s, "ops") or hasattr(s, "policy")]
    entries = getattr(step, "ops", None) or [op for policy in step.policy for op in policy]
    posterize = [op for op in entries if op.name.startswith("Posterize")]
    assert posterize
    for op in posterize:
        assert set(op.aug_fn(image, 0).getdata()) == set(op.aug_fn(image, 1).getdata())
        assert op.aug_fn(image, 8).tobytes() == image.tobytes()
        assert pickle.loads(pickle.dumps(op)).aug_fn is op.aug_fn  # loader processes
