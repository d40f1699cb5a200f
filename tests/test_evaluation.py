"""Slices -> volumes -> native geometry -> metrics, on a set whose slices live in memory."""

import types

import nibabel as nib
import numpy as np
import pytest

from lclseg import evaluation
from lclseg.crf import upsampled_dense_crf
from lclseg.data import grid
from lclseg.data.dataset import PreparedSet, VolumeEntry
from lclseg.data.preprocess import Preprocessing

SIZE, TARGET = 48, 1.1  # of the grid
AFFINE = np.array([[0, -1.3, 0, 7], [-0.8, 0, 0, 9], [0, 0, 5, -3], [0, 0, 0, 1]], float)
# native shape; the pixels are not square
SHAPES = {"first": (60, 44, 3), "second": (71, 37, 1), "third": (50, 50, 5)}
SPACING = (0.8, 1.3, 5.0)


def native_label(shape):
    """A ring of class 1 around a disc of class 2 (in mm), growing from slice to slice."""
    x, y = ((np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape[:2], SPACING[:2], strict=True))
    radius = np.hypot(x[:, None] - 2, y + 1)[..., None]
    growth = np.linspace(1, 1.3, shape[2])
    return ((radius < 15 * growth).astype(np.uint8)) + (radius < 8 * growth)


@pytest.fixture(scope="module")
def prepared():
    """Three volumes whose image is their label map: `perfect` below segments them."""
    records, entries = [], {}
    for volume_id, shape in SHAPES.items():
        label = native_label(shape)
        on_grid = grid.label_to_grid(label, SPACING, image_size=SIZE, target_spacing_mm=TARGET)
        pixels = np.zeros((shape[2], 3), int)
        entries[volume_id] = VolumeEntry(volume_id, volume_id, True, len(records), pixels)
        for s in range(shape[2]):
            records.append(
                {
                    "image": on_grid[s].astype(np.float32),
                    "label": on_grid[s],
                    "native_label": label[..., s],
                    "native_shape": np.array(shape, np.int32),
                    "affine": AFFINE,
                    "orientation": np.array((1, 2, 3)),
                    "spacing_mm": np.array(SPACING),
                }
            )
    source = types.SimpleNamespace(__getitems__=lambda indices: [records[i] for i in indices])
    how = Preprocessing(("ring", "disc"), (1, 2), False, SIZE, TARGET, 0, None)
    return PreparedSet("fake", entries, source, how)


def perfect(images):
    return np.eye(3, dtype=np.float32)[images.astype(int)]


def background(images):
    return np.eye(3, dtype=np.float32)[np.zeros(images.shape, int)]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 5, 9, 100])
@pytest.mark.parametrize("order", [("first", "second", "third"), ("third", "first"), ("second",)])
def test_volumes_come_whole(prepared, batch_size, order):
    """In the order asked for, every slice once, whether or not batches end where volumes do."""
    calls = []

    def predict(images):
        calls.append(len(images))
        return np.stack([images, images + 1, images * 2], axis=-1)

    predictions = list(evaluation.predict_volumes(predict, prepared, order, batch_size=batch_size))
    assert tuple(p.volume_id for p in predictions) == order
    for prediction in predictions:
        image, _ = prepared.read_slices(prepared.volumes[prediction.volume_id].slices)
        np.testing.assert_array_equal(prediction.image, image)
        np.testing.assert_array_equal(
            prediction.probs, np.stack([image, image + 1, image * 2], axis=-1)
        )
    # Full batches; only the last may be smaller.
    total = sum(SHAPES[v][2] for v in order)
    assert sum(calls) == total
    assert all(n == batch_size for n in calls[:-1]) and calls[-1] <= batch_size


def test_to_native_label(prepared):
    label = native_label(SHAPES["first"])
    image, _ = prepared.read_slices(prepared.volumes["first"].slices)
    native = evaluation.to_native_label(perfect(image), prepared.read_native("first"), prepared)
    assert native.shape == label.shape and native.dtype == np.uint8
    for k in (1, 2):
        assert 2 * ((native == k) & (label == k)).sum() > 0.95 * (
            (native == k).sum() + (label == k).sum()
        )


def test_a_finer_grid_lies_where_the_coarse_one_does(prepared):
    """A plane whose border lies between pixels, sampled twice as fine: the border stays."""

    def plane(size):
        spacing = TARGET * SIZE / size
        at = (np.arange(size) - size // 2) * spacing  # mm from the middle pixel
        right = np.clip(0.5 + (at - 3.2) / 100, 0, 1)  # 0.5 at 3.2 mm
        probs = np.stack([1 - right, right, np.zeros_like(right)], axis=-1)
        return np.tile(probs[None, :, None], (SHAPES["first"][2], 1, size, 1))

    # Fine probabilities as the CRF makes them, but for what it refines.
    off = {"num_steps": 0, "spatial_weight": 0.0, "bilateral_weight": 0.0}
    sigmas = dict.fromkeys(("spatial_sigma", "bilateral_sigma", "intensity_sigma"), 1.0)
    upsampled = upsampled_dense_crf(
        np.zeros((SHAPES["first"][2], SIZE, SIZE)), plane(SIZE), upsampling=2, **off, **sigmas
    )
    inside = np.s_[2:-2]  # at its last pixel the plane is not interpolated, but repeated
    np.testing.assert_allclose(upsampled[:, inside], plane(2 * SIZE)[:, inside], atol=1e-5)
    labels = [
        evaluation.to_native_label(np.asarray(probs), prepared.read_native("first"), prepared)
        for probs in (plane(SIZE), upsampled)
    ]
    np.testing.assert_array_equal(*(label[:, 4:-4] for label in labels))
    assert 0 < labels[0].mean() < 1
    assert evaluation.spacing_of(upsampled, prepared) == TARGET / 2


@pytest.mark.parametrize("size, upsampling", [(6, 1), (6, 2), (6, 3), (7, 2), (7, 3)])
def test_labels_of_a_finer_grid_on_the_training_grid(size, upsampling):
    label = np.random.default_rng(0).integers(0, 3, (2, size, size))
    probs = np.eye(3, dtype=np.float32)[label]
    off = {"num_steps": 0, "spatial_weight": 0.0, "bilateral_weight": 0.0}
    sigmas = dict.fromkeys(("spatial_sigma", "bilateral_sigma", "intensity_sigma"), 1.0)
    fine = upsampled_dense_crf(label, probs, upsampling=upsampling, **off, **sigmas)
    assert fine.shape[1] == size * upsampling
    prediction = evaluation.VolumePrediction("first", label.astype(float), probs, np.asarray(fine))
    np.testing.assert_array_equal(prediction.label(), label)


@pytest.mark.parametrize("batch_size", [4, 100])
def test_a_perfect_network_scores_near_one(prepared, batch_size):
    summary = evaluation.evaluate(
        perfect, prepared, list(SHAPES), batch_size=batch_size, with_distances=True
    )
    assert summary["n_volumes"] == 3
    assert list(summary["per_volume"]) == list(SHAPES)
    assert summary["mean_dice"] > 0.96
    assert all(v["mean_dice"] > 0.96 for v in summary["per_volume"].values())
    assert set(summary["dice_per_class"]) == {"ring", "disc"}
    # In mm: at most about the diagonal of a pixel.
    assert summary["mean_hausdorff95_mm"] <= 1.6
    assert summary["mean_assd_mm"] < 0.6


def test_evaluation_is_of_the_native_label(prepared):
    """By hand: the prediction covers a square about the middle with class 2."""

    def predict(images):
        labels = np.zeros(images.shape, int)
        labels[:, 20:28, 20:28] = 2  # 8.8 mm square, in the disc of radius 8 mm
        return np.eye(3)[labels]

    summary = evaluation.evaluate(predict, prepared, ["second"], batch_size=4, with_distances=False)
    x, y = ((np.arange(n) - n // 2) * s for n, s in zip((71, 37), SPACING[:2], strict=True))
    # Native pixels where the square weighs more than half: those within its edges. Its middle is
    # half a pixel of the grid before the middle pixel, which is where the volume's is.
    square = (np.abs(x + 0.55) < 4.4)[:, None] & (np.abs(y + 0.55) < 4.4)
    disc = native_label(SHAPES["second"])[..., 0] == 2
    expected = 2 * (square & disc).sum() / (square.sum() + disc.sum())
    record = summary["per_volume"]["second"]
    assert record["dice"]["disc"] == pytest.approx(expected, abs=0.03)
    assert record["dice"]["ring"] == 0
    assert record["missed"] == ["ring"]
    assert summary["mean_dice"] == pytest.approx(expected / 2, abs=0.015)
    assert summary["mean_hausdorff95_mm"] is None


def test_the_largest_component_is_scored_beside_the_rest(prepared):
    """A speck of the disc's class apart from the disc: gone with the largest component."""

    def with_speck(images):
        probs = perfect(images)
        probs[:, 8:11, 22:26] = np.eye(3)[2]
        return probs

    def score(predict, **kwargs):
        return evaluation.evaluate(
            predict, prepared, ["second"], batch_size=4, with_distances=True, **kwargs
        )

    found, clean = score(with_speck, one_piece=(1, 2)), score(perfect)
    assert found["dice_per_class"]["disc"] < clean["dice_per_class"]["disc"] - 0.01
    assert found["largest_component"] == clean
    # Of the ring's class alone, the speck stays.
    other = score(with_speck, one_piece=(1,))
    assert other.pop("largest_component") == other == score(with_speck)


def test_a_blind_network_scores_zero(prepared):
    summary = evaluation.evaluate(
        background, prepared, ["first", "third"], batch_size=3, with_distances=False
    )
    assert summary["mean_dice"] == 0
    assert summary["n_missed"] == 4


def test_predictions_are_saved_in_native_geometry(prepared, tmp_path):
    """As NIfTI with the volume's affine, spacing and shape, and the labels that were scored."""
    folder = tmp_path / "predictions" / "baseline"
    summary = evaluation.evaluate(
        perfect, prepared, ["third", "first"], batch_size=4, with_distances=False, save_to=folder
    )
    assert {p.name for p in folder.iterdir()} == {"third.nii.gz", "first.nii.gz"}
    for volume_id in ("third", "first"):
        file = nib.load(folder / f"{volume_id}.nii.gz")
        assert file.shape == SHAPES[volume_id]
        assert file.get_data_dtype() == np.uint8
        np.testing.assert_allclose(file.affine, AFFINE, atol=1e-6)
        np.testing.assert_allclose(file.header.get_zooms(), SPACING, rtol=1e-6)
        saved, label = np.asarray(file.dataobj), native_label(SHAPES[volume_id])
        for k, name in enumerate(("ring", "disc"), start=1):
            overlap = 2 * ((saved == k) & (label == k)).sum()
            dice = overlap / ((saved == k).sum() + (label == k).sum())
            assert summary["per_volume"][volume_id]["dice"][name] == pytest.approx(dice)


def test_nothing_is_saved_unasked(prepared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluation.evaluate(perfect, prepared, ["first"], batch_size=4, with_distances=False)
    assert not list(tmp_path.iterdir())
