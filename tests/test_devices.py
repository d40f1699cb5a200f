"""State on several devices: one copy each, and back."""

import jax
import numpy as np

from lclseg.run import devices


def test_a_copy_on_every_device_and_back():
    tree = {"step": np.int32(7), "kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}
    replicated = devices.replicate(tree)
    for name, leaf in replicated.items():
        assert leaf.shape == (4, *np.shape(tree[name])) and leaf.dtype == tree[name].dtype
        assert leaf.sharding.device_set == set(jax.local_devices())
    stepped = jax.pmap(lambda t: jax.tree.map(lambda x: x + 1, t))(replicated)
    for copies in (replicated, stepped):
        found = devices.unreplicate(copies)
        for name, leaf in found.items():
            np.testing.assert_array_equal(leaf, tree[name] + (copies is stepped))
            # No program over all devices made it: that would wait for those that are at work.
            assert leaf.devices() == {jax.local_devices()[0]}


def test_a_batch_is_shared_in_order():
    rows = np.arange(2 * 8).reshape(2, 8)
    shares = devices.share(rows)
    assert shares.shape == (4, 2, 2) and shares.dtype == np.int32
    np.testing.assert_array_equal(np.concatenate(list(shares), axis=-1), rows)
