"""Our reading of Self-Loop uncertainty against loops in NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_method as tiny

from lclseg.methods import self_loop

K, Q, RATE, PENALTY = 6, 3, 0.5, 2.0
PARAMS = {"unet_trunk": {"slope": jnp.float32(1.3)}, "permutation_head": jnp.float32(2.0)}
STATE = tiny.state_of()
METHOD = self_loop.make(
    tiny.options_of(
        "self_loop",
        num_permutations=K,
        num_encoders=Q,
        encoder_learning_rate=RATE,
        spread_penalty=PENALTY,
    ),
    tiny.BASE,
)


def logits_of(slope, image):
    return jnp.stack([slope * image, jnp.sin(5 * image + slope), jnp.cos(9 * image)], axis=-1)


# The permutation's logits are linear in the slope, so that their gradient is simple.
WEIGHTS = np.random.default_rng(4).normal(size=(tiny.SIZE**2, K)).astype(np.float32)


def forward(params, images, heads):
    slope, scale = params["unet_trunk"]["slope"], params["permutation_head"]

    def output(head, x):
        if head == "segmentation":
            return logits_of(slope, x)
        return scale * slope * (x.reshape(len(x), -1) @ WEIGHTS) / tiny.SIZE

    return {g: {h: output(h, x) for h in heads[g]} for g, x in images.items()}


def slow_rearranged(image, order):
    out, side = image.copy(), len(image) // 3
    for i, j in enumerate(order):
        (r, c), (s, d) = divmod(i, 3), divmod(j, 3)
        tile = image[s * side : (s + 1) * side, d * side : (d + 1) * side]
        out[r * side : (r + 1) * side, c * side : (c + 1) * side] = tile
    return out


def number_of(shuffled, image):
    """Which permutation was applied, by trying all."""
    orders = self_loop.distant_permutations(K)
    found = [k for k in range(K) if np.array_equal(slow_rearranged(image, orders[k]), shuffled)]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("size", [9, 64, 96, 128, 192, 256])
def test_tiles_move_and_come_back(size):
    rng = np.random.default_rng(0)
    image, order = rng.normal(size=(size, size)).astype(np.float32), rng.permutation(9)
    found = self_loop.rearrange(jnp.asarray(image), jnp.asarray(order))
    np.testing.assert_array_equal(found, slow_rearranged(image, order))
    back = self_loop.rearrange(found, jnp.argsort(order))
    np.testing.assert_array_equal(back, image)


def test_permutations_are_far_from_each_other():
    found = self_loop.distant_permutations(100)
    assert found.shape == (100, 9)
    np.testing.assert_array_equal(np.sort(found, axis=1), np.tile(np.arange(9), (100, 1)))
    distance = (found[:, None] != found[None]).sum(axis=-1) + 9 * np.eye(100, dtype=int)
    assert distance[:9, :9].min() == 9  # no tile of the first nine stays where it was in another
    assert distance.min() == 6


def test_each_permutation_is_the_farthest_one_left():
    found = [tuple(p) for p in self_loop.distant_permutations(7, num_tiles=4).tolist()]
    assert found[0] == (0, 1, 2, 3)

    def nearest(permutation, chosen):
        return min(sum(a != b for a, b in zip(permutation, c, strict=True)) for c in chosen)

    for i in range(1, 7):
        best = max(nearest(p, found[:i]) for p in itertools.permutations(range(4)))
        assert nearest(found[i], found[:i]) == best > 0


def test_too_many_permutations_are_refused():
    with pytest.raises(ValueError, match="num_permutations is 25"):
        self_loop.distant_permutations(25, num_tiles=4)


def slow_terms(batch, drawn, puzzle):
    """The formulas of the module; `drawn` [Q, n] are the permutations of the Q encoders."""
    image = np.asarray(batch["unlabeled"].image)
    orders = self_loop.distant_permutations(K)
    slope, scale, found = 1.3, 2.0, []
    for numbers in drawn:
        shuffled = np.stack(
            [slow_rearranged(u, orders[k]) for u, k in zip(image, numbers, strict=True)]
        )
        features = scale * shuffled.reshape(len(image), -1) @ WEIGHTS / tiny.SIZE
        error = tiny.softmax(slope * features) - np.eye(K)[numbers]
        slope -= RATE * np.mean(np.sum(error * features, axis=1))
        probs = tiny.softmax(np.asarray(logits_of(slope, shuffled), np.float64))
        back = [
            slow_rearranged(p, np.argsort(orders[k])) for p, k in zip(probs, numbers, strict=True)
        ]
        found.append(np.stack(back))
    assert abs(slope - 1.3) > 0.1
    own = tiny.softmax(np.asarray(logits_of(1.3, image), np.float64))
    losses = []
    for place in np.ndindex(image.shape):
        each = np.stack([p[place] for p in found])
        mean = each.mean(axis=0)
        spread = np.sqrt(np.mean([np.sum((e - mean) ** 2) for e in each]))
        losses.append(np.exp(-PENALTY * spread) * np.mean((own[place] - mean) ** 2))
    features = 2.0 * puzzle.reshape(len(image), -1) @ WEIGHTS / tiny.SIZE
    probs = tiny.softmax(1.3 * features)
    numbers = [number_of(s, u) for s, u in zip(puzzle, image, strict=True)]
    return {
        "uncertainty_guided_loss": np.mean(losses),
        "permutation_loss": -np.mean(np.log(probs[np.arange(len(image)), numbers])),
    }


def make_batch():
    return {"labeled": tiny.slices(0, 4), "unlabeled": tiny.slices(1, 4, is_labeled=False)}


def test_terms_are_those_of_the_formulas():
    batch, seen = make_batch(), []

    def forward_seen(params, images, heads):
        if "u" in images and "segmentation" in heads["u"]:
            jax.debug.callback(lambda x: seen.append(np.asarray(x)), images["u"], ordered=True)
        return forward(params, images, heads)

    values, images = tiny.run_terms(METHOD.terms, forward_seen, PARAMS, STATE, batch)
    jax.effects_barrier()
    image = np.asarray(batch["unlabeled"].image)
    drawn = [[number_of(s, u) for s, u in zip(x, image, strict=True)] for x in seen]
    assert len(drawn) == Q and len({tuple(d) for d in drawn}) == Q
    for name, wanted in slow_terms(batch, drawn, images["shuffled"]).items():
        np.testing.assert_allclose(values[name], wanted, rtol=1e-4, err_msg=name)


def test_no_gradient_flows_through_the_encoders_along_the_way():
    def loss(params, plain):
        # `plain` is what the network itself gives; all else goes through `params`.
        def pass_(own, images, heads):
            if "u" in images:
                return forward(own, images, heads)
            slope = {"unet_trunk": {"slope": plain}, "permutation_head": 2.0}
            return forward(slope, images, heads)

        terms, _ = METHOD.terms(tiny.FakeNet(pass_), params, STATE, make_batch(), tiny.KEY)
        return terms["uncertainty_guided_loss"].total

    through, plain = jax.jit(jax.grad(loss, argnums=(0, 1)))(PARAMS, jnp.float32(1.3))
    assert plain != 0
    assert all(g == 0 for g in jax.tree.leaves(through))


def test_the_classifier_reads_the_mean_of_the_bottom_features():
    head = self_loop.PermutationHead(2)
    x = jnp.arange(16.0).reshape(1, 2, 4, 2)
    params = {"Dense_0": {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}}
    np.testing.assert_allclose(head.apply({"params": params}, x, train=True), [[7, 8]])
    assert head.level == -1


def test_one_device_equals_four():
    groups = {"labeled": tiny.slices(0, 4), "unlabeled": tiny.slices(1, 8, is_labeled=False)}
    tiny.assert_same_on_4_devices(METHOD.terms, METHOD.views, forward, PARAMS, STATE, groups)
