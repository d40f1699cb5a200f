"""Pseudo-labels of a round, on a set whose slices live in memory: images tell what to predict."""

import dataclasses
import json
import os
import types

import nibabel as nib
import numpy as np
import pytest

from lclseg import pseudo_labels
from lclseg.data import grid
from lclseg.data.dataset import PreparedSet, VolumeEntry
from lclseg.data.preprocess import Preprocessing

AFFINE = np.array([[-1, 0, 0, 9], [0, 0, 1, 5], [0, 7, 0, -2], [0, 0, 0, 1]], float)


def stripe(first, last, value=1):
    """[8, 8], `value` in the rows first..last - 1."""
    image = np.zeros((8, 8), np.float32)
    image[first:last] = value
    return image


def predict(images):
    """Class round(v) where the pixel is v; probability 0.6 where v is below it, else 0.8."""
    label = np.rint(images).astype(int)
    top = np.where(images < label, 0.6, 0.8)[..., None]
    return np.where(np.eye(3, dtype=bool)[label], top, (1 - top) / 2).astype(np.float32)


def saturated(image, probs, slice_spacing_mm):
    """Refines as a CRF does: it is sure of the same class."""
    return np.where(probs == probs.max(axis=-1, keepdims=True), 0.999, 0.0005).astype(np.float32)


def background(images):
    return np.tile(np.array([0.9, 0.1, 0], np.float32), (*images.shape, 1))


# Of volume_id: prediction by slice on the grid, and native ground truth (None: there is none).
IMAGES = {
    "train": [stripe(0, 8)] * 2,  # not in the pool
    "a": [stripe(2, 4), stripe(0, 0), stripe(5, 6, 2)],
    "b": [stripe(0, 0) - 0.25] * 2,  # background, and not so sure
    "c": [stripe(1, 5)],
}
TRUTH = {
    "train": None,
    "a": [stripe(2, 4), stripe(2, 4), stripe(0, 8, 2)],
    "b": [stripe(0, 0)] * 2,
    "c": None,
}
POOL = ("c", "a", "b")  # not in stored order


def make_prepared(*, native_size=(8, 8), spacing_mm=(1.0, 1.0, 4.0)):
    records, entries = [], {}
    for volume_id, images in IMAGES.items():
        pixels = np.zeros((len(images), 3), int)
        has_label = TRUTH[volume_id] is not None
        entries[volume_id] = VolumeEntry(volume_id, volume_id, has_label, len(records), pixels)
        for s, image in enumerate(images):
            native = np.zeros(native_size, np.uint8)
            if has_label and native_size == (8, 8):
                native = TRUTH[volume_id][s].astype(np.uint8)
            records.append(
                {
                    "image": image,
                    "label": np.full((8, 8), 2, np.uint8),  # hidden truth: must not be used
                    "native_label": native,
                    "native_shape": np.array([*native_size, len(images)], np.int32),
                    "affine": AFFINE,
                    "orientation": np.array((1, 2, 3)),
                    "spacing_mm": np.array(spacing_mm),
                }
            )
    source = types.SimpleNamespace(__getitems__=lambda indices: [records[i] for i in indices])
    how = Preprocessing(("one", "two"), (1, 2), False, 8, 1.0, 0, None)
    return PreparedSet("fake", entries, source, how)


def make(
    folder,
    *,
    prepared=None,
    predict=predict,
    volume_ids=POOL,
    batch_size=4,
    refine=saturated,
    previous=None,
    **options,
):
    return pseudo_labels.make_pseudo_labels(
        predict,
        prepared or make_prepared(),
        volume_ids,
        folder,
        batch_size=batch_size,
        refine=refine,
        previous=previous,
        **options,
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("run") / "pseudo_labels" / "round_1")


EXPECTED = [np.rint(image) for v in ("a", "b", "c") for image in IMAGES[v]]


@pytest.mark.parametrize("batch_size", [1, 4, 6, 50])
@pytest.mark.parametrize("volume_ids", [POOL, ("a", "b", "c")])
def test_labels_are_the_argmax(tmp_path, batch_size, volume_ids):
    """In stored order, whatever the order of the ids and the size of the batches."""
    labels = make(tmp_path, batch_size=batch_size, volume_ids=volume_ids)
    assert labels.records.tolist() == [2, 3, 4, 5, 6, 7]  # 0 and 1 are "train"
    assert labels.labels.dtype == np.uint8
    np.testing.assert_array_equal(labels.labels, EXPECTED)


def test_argmax_of_noise(tmp_path):
    """Probabilities without pattern, drawn per slice."""
    images = [image for slices in IMAGES.values() for image in slices]
    probs = {
        image.tobytes(): np.random.default_rng(n).dirichlet(np.ones(3), (8, 8))
        for n, image in enumerate(images)
    }

    def noise(batch):
        return np.stack([probs[i.tobytes()] for i in batch])

    labels = make(tmp_path, predict=noise)
    for record, label in zip(labels.records, labels.labels, strict=True):
        p = probs[images[record].tobytes()]
        for i, j in np.ndindex(8, 8):
            assert p[i, j, label[i, j]] == max(p[i, j])


def test_read(made):
    """By record, in any order, as often as asked."""
    read = made.read(np.array([7, 2, 4, 2]))
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, [EXPECTED[i] for i in (5, 0, 2, 0)])
    assert made.read(np.array([], int)).shape == (0, 8, 8)


@pytest.mark.parametrize("records", [[0], [2, 1], [8], [3, 99], [-1]])
def test_read_a_record_that_has_none(made, records):
    with pytest.raises(KeyError, match=f"no pseudo-label .*{records[-1]}"):
        made.read(np.array(records))


def test_read_between_two_volumes(tmp_path):
    """Records of the pool need not be consecutive; those in the gap have no label."""
    labels = make(tmp_path, volume_ids=("c", "a"))
    assert labels.records.tolist() == [2, 3, 4, 7]
    np.testing.assert_array_equal(labels.read(np.array([7, 4])), [EXPECTED[5], EXPECTED[2]])
    with pytest.raises(KeyError):
        labels.read(np.array([5]))


def test_class_pixels_count_the_pseudo_labels(made):
    """The sampler's table, by hand; neither the hidden truth nor the index has these numbers."""
    expected = [[48, 16, 0], [64, 0, 0], [56, 0, 8], [64, 0, 0], [64, 0, 0], [32, 32, 0]]
    assert made.class_pixels.tolist() == expected


def test_report_by_hand(made):
    report = made.report
    assert report["num_volumes"] == 3
    # Class one: 16 in a, 32 in c; class two: 8 in a.
    assert report["mean_voxels_per_class"] == pytest.approx({"one": 16, "two": 8 / 3})
    assert report["empty_volumes"] == ["b"]
    # The network's confidence is 0.8 all over a and c, 0.6 all over b; refined it is 0.999.
    assert report["mean_confidence"] == pytest.approx((0.8 + 0.6 + 0.8) / 3)
    assert report["dice_with_previous_round"] is None
    # a: class one has 16 voxels, the truth 32, 16 in common: 2/3; class two 8, 64, 8: 2/9.
    # b: nothing predicted, nothing there: no score. c: no truth.
    assert report["true_dice_per_class"] == pytest.approx({"one": 2 / 3, "two": 2 / 9})
    assert report["true_mean_dice"] == pytest.approx(4 / 9)


def test_report_is_on_disk_as_strict_json(made):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (made.folder / "report.json").read_text()
    assert json.loads(text, parse_constant=refuse) == made.report


def test_no_truth_at_all(tmp_path):
    """Real unlabelled volumes: the report says None."""
    report = make(tmp_path, volume_ids=("c",)).report
    assert report["true_mean_dice"] is None
    assert report["true_dice_per_class"] == {"one": None, "two": None}
    assert report["empty_volumes"] == []


def test_all_volumes_empty(tmp_path):
    labels = make(tmp_path, predict=background)
    assert labels.report["empty_volumes"] == ["a", "b", "c"]
    assert labels.report["mean_voxels_per_class"] == {"one": 0, "two": 0}
    assert labels.report["true_mean_dice"] == 0  # both classes of a are missed
    assert not labels.labels.any()


def test_agreement_with_the_previous_round(made, tmp_path):
    """a shifted by a row, b still empty, c gone."""

    def moved(images):
        images = np.roll(images, 1, axis=1)
        images[images.sum(axis=(1, 2)) == 32] = 0
        return predict(images)

    after = make(tmp_path, predict=moved, previous=made)
    # a, class one: 16, 16, 8 in common: 1/2; class two: 8, 8, none: 0; mean 1/4.
    # b: empty twice: nothing to compare. c: class one 0 now, 32 before: 0; class two never there.
    assert after.report["dice_with_previous_round"] == pytest.approx((1 / 4 + 0) / 2)


def test_agreement_of_a_round_with_itself(made, tmp_path):
    assert make(tmp_path, previous=made).report["dice_with_previous_round"] == 1


def test_agreement_is_with_the_same_slices(made, tmp_path):
    """The volumes in another order and in other batches: still the same pseudo-labels."""
    again = make(tmp_path, volume_ids=("b", "c", "a"), batch_size=5, previous=made)
    assert again.report["dice_with_previous_round"] == 1


def test_nifti_files_in_native_geometry(tmp_path):
    """Coarser along X, finer along Y and smaller than the grid: as the native map would have it."""
    spacing_mm = (1.6, 0.5, 4.0)
    prepared = make_prepared(native_size=(5, 12), spacing_mm=spacing_mm)
    labels = make(tmp_path, prepared=prepared)
    assert {p.name for p in tmp_path.glob("*.nii.gz")} == {f"{v}.nii.gz" for v in POOL}
    for volume_id in POOL:
        file = nib.load(tmp_path / f"{volume_id}.nii.gz")
        num_slices = len(IMAGES[volume_id])
        assert file.shape == (5, 12, num_slices)
        assert file.get_data_dtype() == np.uint8
        np.testing.assert_allclose(file.affine, AFFINE)
        np.testing.assert_allclose(file.header.get_zooms(), spacing_mm, rtol=1e-6)
        expected = grid.probs_to_native_label(
            predict(np.stack(IMAGES[volume_id])), spacing_mm, (5, 12), target_spacing_mm=1.0
        )
        np.testing.assert_array_equal(np.asarray(file.dataobj), expected)
    # Rows 1..4 of 8 lie -3 mm .. 0 mm from the middle; native rows at -3.2, -1.6, 0, 1.6, 3.2.
    c = np.asarray(nib.load(tmp_path / "c.nii.gz").dataobj)
    assert c[:, :, 0].tolist() == [[1] * 12, [1] * 12, [1] * 12, [0] * 12, [0] * 12]
    assert labels.labels.shape == (6, 8, 8)


def test_load_equals_make(made):
    loaded = pseudo_labels.load_pseudo_labels(made.folder, make_prepared())
    assert loaded.folder == made.folder
    assert loaded.report == made.report
    for name in ("records", "labels", "class_pixels"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(made, name))


def test_pseudo_labels_cannot_be_changed(made):
    before = made.labels[0].copy()
    with pytest.raises(ValueError, match="read-only"):
        made.labels[0, 0, 0] = 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.report = {}
    batch = made.read(np.array([2]))
    batch[:] = 2  # a batch may be: it is a copy
    np.testing.assert_array_equal(made.labels[0], before)


@pytest.mark.parametrize("system", ["this", "macOS"])
def test_space_on_disk_is_taken_ahead(system, tmp_path, monkeypatch):
    if system == "macOS":
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    path = tmp_path / "labels.npy"
    np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(40, 256, 256))
    content = path.read_bytes()
    assert 512 * path.stat().st_blocks < len(content)  # sparse: else nothing is tested
    pseudo_labels._reserve(path)
    assert 512 * path.stat().st_blocks >= len(content)
    assert path.read_bytes() == content


def test_labels_stay_on_disk(made):
    """Memory does not grow with the pool."""
    assert isinstance(made.labels, np.memmap)
    assert (made.folder / "labels.npy").stat().st_size >= 6 * 64


def test_an_interrupted_round_is_not_complete(tmp_path):
    """report.json, which marks a round complete, comes last."""
    calls = []

    def fails_later(images):
        calls.append(len(images))
        if len(calls) == 3:
            raise RuntimeError("killed")
        return predict(images)

    with pytest.raises(RuntimeError, match="killed"):
        make(tmp_path / "round", predict=fails_later, batch_size=2)
    assert not (tmp_path / "round" / "report.json").exists()
    np.testing.assert_array_equal(make(tmp_path / "round").labels, EXPECTED)
    # Made anew in place of complete ones, and stopped: no longer complete.
    calls.clear()
    with pytest.raises(RuntimeError, match="killed"):
        make(tmp_path / "round", predict=fails_later, batch_size=2)
    assert not (tmp_path / "round" / "report.json").exists()


AGREEMENTS = {"a": 0.95, "b": 0.2, "c": 0.9}


def test_the_gate_leaves_out_what_does_not_agree(tmp_path):
    """Above 0.9 only: c, at 0.9, is out. What is out is neither read nor counted nor written."""
    labels = make(tmp_path, agreements=AGREEMENTS, min_agreement=0.9)
    assert labels.records.tolist() == [2, 3, 4]
    np.testing.assert_array_equal(labels.labels, EXPECTED[:3])
    assert labels.report["volume_ids"] == ["a"] and labels.report["num_volumes"] == 1
    assert labels.report["gate"] == {
        "min_agreement": 0.9,
        "agreement": AGREEMENTS,
        "rejected": ["b", "c"],
    }
    assert not (tmp_path / "b.nii.gz").exists()
    with pytest.raises(KeyError):
        labels.read(np.array([7]))
    loaded = pseudo_labels.load_pseudo_labels(tmp_path, make_prepared())
    assert loaded.records.tolist() == [2, 3, 4]


def test_agreement_with_the_previous_round_is_over_volumes_of_both(tmp_path):
    before = make(tmp_path / "1", agreements=AGREEMENTS, min_agreement=0.9)
    after = make(tmp_path / "2", previous=before)
    assert after.report["dice_with_previous_round"] == 1


def test_no_volume_passes_the_gate(made, tmp_path, caplog):
    again = make(
        tmp_path / "2", predict=background, previous=made, agreements=AGREEMENTS, min_agreement=0.99
    )
    np.testing.assert_array_equal(again.labels, EXPECTED)
    assert again.records.tolist() == made.records.tolist()
    assert "above 0.99" in again.report["kept_previous"]
    assert again.report["gate"]["rejected"] == ["a", "b", "c"]
    assert "round before are kept" in caplog.text
    assert (tmp_path / "2" / "c.nii.gz").exists()


def test_no_volume_passes_the_gate_in_the_first_round(tmp_path):
    with pytest.raises(
        pseudo_labels.PseudoLabelError, match=r"above 0\.99 .*0\.950.*min_agreement"
    ):
        make(tmp_path, agreements=AGREEMENTS, min_agreement=0.99)


def test_a_vanished_class_keeps_the_previous_round(made, tmp_path, caplog):
    def without_two(images):
        return predict(np.minimum(images, 1))

    folder = tmp_path / "2"
    again = make(folder, predict=without_two, previous=made)
    np.testing.assert_array_equal(again.labels, EXPECTED)
    assert again.report["kept_previous"] == "no volume shows two any more"
    assert "no volume shows two any more" in caplog.text
    # The files are those of the labels in use.
    for volume_id in POOL:
        ours, theirs = (nib.load(f / f"{volume_id}.nii.gz") for f in (folder, made.folder))
        np.testing.assert_array_equal(np.asarray(ours.dataobj), np.asarray(theirs.dataobj))


def test_collapse_is_told(tmp_path, caplog):
    """ "train" has 10 voxels of each class: more than four times as much, or less, is odd."""
    prepared = make_prepared()
    prepared.volumes["train"].class_pixels[:, 1:] = 5
    usual = make(tmp_path / "usual", prepared=prepared, labeled_ids=["train"])
    assert usual.report["warnings"] == []  # 16 and 8 / 3 voxels
    prepared.volumes["train"].class_pixels[:, 2] = 6  # 12 > 4 * 8 / 3
    odd = make(tmp_path / "odd", prepared=prepared, labeled_ids=["train"])
    assert odd.report["warnings"] == ["two has 3 voxels a volume, in the labelled volumes 12"]
    empty = make(tmp_path / "empty", prepared=prepared, labeled_ids=["train"], predict=background)
    assert empty.report["warnings"][0] == "3 of 3 volumes are empty"
    assert len(empty.report["warnings"]) == 3
    assert all(w in caplog.text for w in empty.report["warnings"])


def test_the_label_is_the_refined_one_and_its_confidence_the_networks(tmp_path):
    """Refining turns class one into two, and is sure of it."""
    seen = []

    def swap(image, probs, slice_spacing_mm):
        seen.append((image, slice_spacing_mm))
        return saturated(image, probs[..., [0, 2, 1]], slice_spacing_mm)

    labels = make(tmp_path, refine=swap, min_confidence=0.7)
    for volume_id, (image, slice_spacing_mm) in zip(("a", "b", "c"), seen, strict=True):
        np.testing.assert_array_equal(image, IMAGES[volume_id])
        assert slice_spacing_mm == 4.0
    swapped = [np.array([0, 2, 1])[image.astype(int)] for image in EXPECTED]
    swapped[3:5] = [np.full((8, 8), 255)] * 2  # b, of which the network is not sure
    np.testing.assert_array_equal(labels.labels, swapped)
    assert labels.report["mean_confidence"] == pytest.approx((0.8 + 0.6 + 0.8) / 3)
    assert np.asarray(nib.load(tmp_path / "c.nii.gz").dataobj).max() == 2


def test_uncertain_pixels_become_no_class(tmp_path):
    """The network is 0.6 sure all over b, 0.8 of the others, however sure refining is: by hand."""
    labels = make(tmp_path, min_confidence=0.7)
    expected = [*EXPECTED[:3], *[np.full((8, 8), 255)] * 2, EXPECTED[5]]
    np.testing.assert_array_equal(labels.labels, expected)
    assert labels.class_pixels.tolist()[3:5] == [[0, 0, 0]] * 2  # none is drawn for its classes
    assert labels.report["ignored_fraction"] == pytest.approx(1 / 3)  # mean over volumes
    assert labels.report["empty_volumes"] == ["b"]
    # The files for people to look at show the most probable class everywhere.
    assert np.asarray(nib.load(tmp_path / "b.nii.gz").dataobj).max() == 0
