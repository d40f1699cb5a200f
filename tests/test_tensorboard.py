import numpy as np

from lclseg.run import tensorboard


def test_overlay_paints_classes_and_leaves_the_slice():
    image = np.array([[0.0, 0.5], [1.0, 1.4]])
    truth = np.array([[0, 1], [0, 2]])
    picture = tensorboard.overlay(image, truth, np.zeros((2, 2), int))
    assert picture.shape == (2, 6, 3) and picture.dtype == np.uint8
    grey = np.array([[0, 127], [255, 255]])
    for panel in (picture[:, :2], picture[:, 4:]):
        np.testing.assert_array_equal(panel, np.repeat(grey[..., None], 3, axis=-1))
    painted = picture[:, 2:4]
    # Half of 127.5 and of (230, 159, 0); half of 255 and of (86, 180, 233).
    np.testing.assert_array_equal(painted[0, 1], [178, 143, 63])
    np.testing.assert_array_equal(painted[1, 1], [170, 217, 244])
    np.testing.assert_array_equal(painted[:, 0], [[0, 0, 0], [255, 255, 255]])
