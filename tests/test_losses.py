"""Losses against the authors' numbers, loops over the equations, Optax and hand work."""

import functools
import inspect
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lclseg import losses

GOLDEN_FOLDER = Path(__file__).parent / "golden"
GOLDEN = ("acdc_inter", "acdc_intra", "mmwhs_inter", "prostate_inter")
SHAPE = (2, 6, 5)
NUM_CLASSES = 4


def make_pair(seed, case="all", embedding_dim=NUM_CLASSES):
    """Random embeddings and labels of a pair; `case` says which classes are missing where."""
    rng = np.random.default_rng(seed)
    embeddings = rng.normal(size=(*SHAPE, embedding_dim)).astype(np.float32)
    labels = rng.integers(0, NUM_CLASSES, SHAPE).astype(np.uint8)
    match case:
        case "absent_in_one":
            labels[0][labels[0] == 2] = 0
        case "absent_in_both":
            labels[labels == 2] = 0
        case "disjoint":
            labels[0][labels[0] == 1] = 0
            labels[1][labels[1] > 1] = 0
        case "one_empty":
            labels[1] = 0
        case "no_foreground":
            labels[:] = 0
        case "no_background":
            labels[labels == 0] = 3
    return embeddings, labels


CASES = (
    "all",
    "absent_in_one",
    "absent_in_both",
    "disjoint",
    "one_empty",
    "no_foreground",
    "no_background",
)


def draw(seed, labels, k, include_background):
    return _draw(jax.random.key(seed), labels, k, include_background)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _draw(key, labels, k, include_background):
    return losses.sample_anchors(
        key,
        labels,
        num_classes=NUM_CLASSES,
        pixels_per_class=k,
        include_background=include_background,
    )


def slow_terms(embeddings, labels, anchors, references, *, temperature, matching, classes):
    """[(weight, term)] over images, anchors and positives, straight from the equations.

    `references`: (embeddings, labels) of the images whose class means all anchors see; None for
    intra, where an anchor sees those of its own image.
    """

    def cosine(a, b):
        return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))

    def means(z, y):
        return {c: z[y == c].mean(axis=0) for c in classes if (y == c).any()}

    terms = []
    for image in range(2):
        z, y = embeddings[image], labels[image]
        seen = [(z, y)] if matching == "intra" else references
        seen = [means(*reference) for reference in seen]
        for place, c in enumerate(classes):
            if not (y == c).any():
                continue
            if anchors is None:
                pixels = np.argwhere(y == c)
            else:
                pixels = anchors[image][place]
            for row, column in pixels:
                anchor = z[row, column]
                exponentials = [
                    math.exp(cosine(anchor, m) / temperature)
                    for by_class in seen
                    for m in by_class.values()
                ]
                for by_class in seen:
                    if c in by_class:
                        attraction = cosine(anchor, by_class[c]) / temperature
                        terms.append((1 / len(pixels), math.log(sum(exponentials)) - attraction))
    return terms


def slow_loss(
    embeddings,
    labels,
    anchors,
    references=None,
    *,
    temperature=0.1,
    matching="inter",
    include_background=False,
    num_classes=NUM_CLASSES,
):
    """Each class of each image counts the same, by however many pixels it is represented."""
    embeddings = np.asarray(embeddings, np.float64)
    terms = slow_terms(
        embeddings,
        np.asarray(labels),
        None if anchors is None else np.asarray(anchors),
        references or list(zip(embeddings, np.asarray(labels), strict=True)),
        temperature=temperature,
        matching=matching,
        classes=range(0 if include_background else 1, num_classes),
    )
    return sum(w * t for w, t in terms) / sum(w for w, _ in terms) if terms else 0.0


def numerical_slope(f, x, direction, step=1e-5):
    return (f(x + step * direction) - f(x - step * direction)) / (2 * step)


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _value_and_grad(
    embeddings, labels, anchors, temperature, matching, include_background, num_classes
):
    loss = functools.partial(
        losses.local_contrastive_loss,
        num_classes=num_classes,
        temperature=temperature,
        matching=matching,
        include_background=include_background,
    )
    return jax.value_and_grad(loss)(embeddings, labels, anchors)


def value_and_grad(
    embeddings,
    labels,
    anchors,
    *,
    matching,
    temperature=0.1,
    include_background=False,
    num_classes=NUM_CLASSES,
):
    """Positional for the compiled function: the same options must not compile twice."""
    return _value_and_grad(
        embeddings, labels, anchors, temperature, matching, include_background, num_classes
    )


def test_golden_folder_holds_no_untested_file():
    assert {path.stem for path in GOLDEN_FOLDER.glob("*.npz")} == set(GOLDEN)


@pytest.mark.parametrize("name", GOLDEN)
def test_contrastive_agrees_with_the_authors_program(name):
    golden = np.load(GOLDEN_FOLDER / f"{name}.npz", allow_pickle=False)
    loss, grad = value_and_grad(
        golden["embeddings"],
        golden["labels"],
        golden["anchors"],
        num_classes=int(golden["num_classes"]),
        temperature=float(golden["temperature"]),
        matching=str(golden["matching"]),
    )
    # Twice our mean over terms. inter: they divide the four terms of an anchor pair by a count for
    # two. intra: they add up the means of the two images (here every class is in both of them, so
    # that the mean over all terms is half that sum).
    np.testing.assert_allclose(2 * loss, golden["loss"], rtol=1e-5)
    largest = np.abs(golden["grad"]).max()
    np.testing.assert_allclose(2 * grad, golden["grad"], rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("include_background", [False, True])
@pytest.mark.parametrize("k", [3, None])
@pytest.mark.parametrize("matching", ["intra", "inter"])
def test_contrastive_equals_the_triple_loop(matching, k, include_background, case):
    embeddings, labels = make_pair(CASES.index(case), case)
    anchors = None if k is None else draw(1, labels, k, include_background)
    options = {"matching": matching, "include_background": include_background}
    loss, grad = value_and_grad(embeddings, labels, anchors, temperature=0.3, **options)

    def expected(z):
        return slow_loss(z, labels, anchors, temperature=0.3, **options)

    np.testing.assert_allclose(loss, expected(embeddings), rtol=1e-5, atol=1e-6)
    direction = np.random.default_rng(5).normal(size=embeddings.shape)
    slope = numerical_slope(expected, embeddings.astype(np.float64), direction)
    np.testing.assert_allclose(np.sum(grad * direction), slope, rtol=1e-4, atol=1e-5)


def batch_of_pairs():
    pairs = [
        make_pair(i, c) for i, c in enumerate(("all", "absent_in_one", "no_foreground", "all"))
    ]
    return tuple(np.stack(arrays) for arrays in zip(*pairs, strict=True))


def batch_grad_and_losses(axis_name, embeddings, labels, anchors):
    """Gradient of the sum over the local pairs, and each pair's loss."""
    loss = functools.partial(
        losses.local_contrastive_loss,
        num_classes=NUM_CLASSES,
        matching="batch",
        temperature=0.3,
        axis_name=axis_name,
    )

    def summed(z):
        each = jax.vmap(loss, axis_name="pairs")(z, labels, anchors)
        return jnp.sum(each), each

    return jax.grad(summed, has_aux=True)(embeddings)


on_one_device = jax.jit(functools.partial(batch_grad_and_losses, "pairs"))


@pytest.mark.parametrize("k", [3, None])
def test_batch_matching_sees_every_image_of_the_batch(k):
    embeddings, labels = batch_of_pairs()
    anchors = None if k is None else np.stack([draw(i, y, k, False) for i, y in enumerate(labels)])
    shape = (-1, *SHAPE[1:])

    def expected(z):
        references = list(zip(z.reshape(*shape, z.shape[-1]), labels.reshape(shape), strict=True))
        return [
            slow_loss(z[i], labels[i], a, references, temperature=0.3, matching="batch")
            for i, a in enumerate([None] * 4 if anchors is None else anchors)
        ]

    grad, each = on_one_device(embeddings, labels, anchors)
    embeddings = embeddings.astype(np.float64)
    np.testing.assert_allclose(each, expected(embeddings), rtol=1e-5)
    assert each[2] == 0  # no foreground
    direction = np.random.default_rng(5).normal(size=embeddings.shape)
    slope = numerical_slope(lambda z: sum(expected(z)), embeddings, direction)
    np.testing.assert_allclose(np.sum(grad * direction), slope, rtol=1e-4)


def test_batch_matching_over_two_devices_equals_one():
    batch = (*batch_of_pairs(), None)
    grad, each = on_one_device(*batch)
    mapped = jax.pmap(
        functools.partial(batch_grad_and_losses, ("devices", "pairs")),
        axis_name="devices",
        devices=jax.local_devices()[:2],
    )
    # Differentiating each device's own sum gives the whole gradient: the reverse of the gathering
    # brings home what the other device's losses owe to this device's embeddings.
    grad_2, each_2 = mapped(*jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), batch))
    np.testing.assert_allclose(each_2.ravel(), each, rtol=1e-6)
    np.testing.assert_allclose(grad_2.reshape(grad.shape), grad, rtol=1e-5, atol=1e-6)


def test_batch_matching_of_a_lone_pair_is_inter_matching():
    embeddings, labels = make_pair(0)
    _, batch = on_one_device(embeddings[None], labels[None], None)
    inter, _ = value_and_grad(embeddings, labels, None, matching="inter", temperature=0.3)
    np.testing.assert_allclose(batch, [inter], rtol=1e-6)


@pytest.mark.parametrize("axis_name", [None, ()])
def test_batch_matching_needs_to_know_where_the_batch_is(axis_name):
    """It would be inter matching under another name."""
    embeddings, labels = batch_of_pairs()
    loss = functools.partial(
        losses.local_contrastive_loss, anchors=None, num_classes=4, matching="batch"
    )
    with pytest.raises(ValueError, match=r'no axis_name.*vmap\(loss, axis_name="pairs"\).*"inter"'):
        jax.vmap(functools.partial(loss, axis_name=axis_name), axis_name="pairs")(
            embeddings, labels
        )


@pytest.mark.parametrize("matching", ["inter", "batch"])
def test_the_snippet_of_the_readme(matching):
    """As printed, and with the matching changed in it."""
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (snippet,) = (s for s in text.split("```") if s.startswith("python\nloss_of_a_pair"))
    assert snippet.count('matching="inter"') == 1
    names = {
        "embeddings": batch_of_pairs()[0],
        "labels": batch_of_pairs()[1],
        "local_contrastive_loss": losses.local_contrastive_loss,
        "jax": jax,
        "functools": functools,
    }
    exec(snippet.removeprefix("python").replace('"inter"', f'"{matching}"'), names)
    z, y = names["embeddings"], names["labels"]
    everyone = list(zip(z.reshape(8, *z.shape[2:]), y.reshape(8, *y.shape[2:]), strict=True))
    references = everyone if matching == "batch" else None
    expected = [slow_loss(*pair, None, references) for pair in zip(z, y, strict=True)]
    np.testing.assert_allclose(names["loss"], np.mean(expected), rtol=1e-5)


def products(jaxpr):
    """All dot_generals of a jaxpr, those inside its calls too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from products(inner)


@pytest.mark.parametrize("k", [3, None])
@pytest.mark.parametrize("matching", ["intra", "inter", "batch"])
def test_every_product_is_in_full_precision(matching, k):
    """TF32 and bfloat16, the default on accelerators, would be divided by a temperature of 0.1."""
    embeddings, labels = batch_of_pairs()
    anchors = None if k is None else np.stack([draw(0, y, k, False) for y in labels])
    loss = functools.partial(
        losses.local_contrastive_loss,
        num_classes=NUM_CLASSES,
        matching=matching,
        axis_name="pairs",
    )

    def summed(z):
        return jnp.sum(jax.vmap(loss, axis_name="pairs")(z, labels, anchors))

    for function, at_least in ((summed, 3), (jax.grad(summed), 6)):
        found = list(products(jax.make_jaxpr(jax.jit(function))(embeddings).jaxpr))
        assert len(found) >= at_least  # class means, similarities, denominators; back again
        for product in found:
            assert product.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2, product


@pytest.mark.parametrize("k", [3, None])
@pytest.mark.parametrize("matching", ["intra", "inter"])
def test_the_gradient_of_tiny_embeddings_is_bounded(matching, k):
    """A cosine does not see the length, so its gradient grows with 1 / length: down to 1e-4."""
    embeddings, labels = make_pair(0)
    anchors = None if k is None else draw(1, labels, k, False)
    for scale in 10.0 ** -np.arange(0, 20, 0.5):
        tiny = (scale * embeddings).astype(np.float32)
        _, grad = value_and_grad(tiny, labels, anchors, matching=matching)
        assert np.abs(grad).max() < 1e4
    # One pixel that has lost its length among others that have not.
    for length in 10.0 ** -np.arange(0, 20, 0.5):
        one = embeddings.copy()
        row, column = np.argwhere(labels[0] == 1)[0] if k is None else anchors[0, 0, 0]
        one[0, row, column] *= length
        _, grad = value_and_grad(one, labels, anchors, matching=matching)
        assert np.abs(grad).max() < 1e4


def hand_worked_pair():
    # x:  background (5, 5)   class 1 (2, 0)        x':  background (5, 0)   class 1 (1, 0)
    #     class 1 (0, 2)      class 2 (0, 3)             background (0, 5)   class 1 (3, 0)
    # Class 2 is absent from x'.
    embeddings = np.array(
        [[[[5, 5], [2, 0]], [[0, 2], [0, 3]]], [[[5, 0], [1, 0]], [[0, 5], [3, 0]]]]
    )
    labels = np.array([[[0, 1], [1, 2]], [[0, 1], [0, 1]]], np.uint8)
    return embeddings.astype(np.float32), labels


# Directions of the means: m1(x) ~ (1, 1), m2(x) ~ (0, 1), m1(x') ~ (1, 0); temperature 1.
# Cosines    m1(x)    m2(x)   m1(x')
# (2, 0)     0.70711  0       1
# (0, 2)     0.70711  1       0
# (0, 3)     0.70711  1       0
# x' (., 0)  0.70711  0       1
#
# intra, denominators: log(e^0.70711 + e^0) = 1.10794 for (2, 0) and
# log(e^0.70711 + e^1) = 1.55739 for (0, 2) and (0, 3).
#   x, class 1: (1.10794 - 0.70711 + 1.55739 - 0.70711) / 2 = 0.62556
#   x, class 2: 1.55739 - 1 = 0.55739
#   x', class 1 is the only class: 0
#   mean of the three: 0.39431
# inter, denominators: log(e^0.70711 + e^0 + e^1) = 1.74857 for every anchor.
#   x, class 1: against m1(x) 1.74857 - 0.70711 = 1.04147; against m1(x') on average
#               1.74857 - (1 + 0) / 2 = 1.24857
#   x, class 2: against m2(x) 1.74857 - 1 = 0.74857; x' has no m2
#   x', class 1: against m1(x) 1.04147, against m1(x') 0.74857
#   mean of the five: 0.96573
@pytest.mark.parametrize(("matching", "expected"), [("intra", 0.39431), ("inter", 0.96573)])
def test_contrastive_of_two_by_two_pixels_by_hand(matching, expected):
    embeddings, labels = hand_worked_pair()
    # Each foreground pixel once, or twice where the class has only one; of the absent class, junk.
    anchors = np.array(
        [
            [[[0, 1], [1, 0]], [[1, 1], [1, 1]]],
            [[[0, 1], [1, 1]], [[0, 0], [1, 0]]],
        ]
    )
    for chosen in (None, anchors):
        loss, _ = value_and_grad(
            embeddings, labels, chosen, num_classes=3, temperature=1.0, matching=matching
        )
        np.testing.assert_allclose(loss, expected, atol=1e-5)


@pytest.mark.parametrize("matching", ["intra", "inter"])
def test_contrastive_does_not_depend_on_pixel_order(matching):
    embeddings, labels = make_pair(0, "absent_in_one")
    order = np.random.default_rng(1).permutation(labels[0].size)

    def shuffled(x):
        return x.reshape(2, order.size, -1)[:, order].reshape(x.shape)

    loss, grad = value_and_grad(embeddings, labels, None, matching=matching)
    moved, moved_grad = value_and_grad(
        shuffled(embeddings), shuffled(labels), None, matching=matching
    )
    np.testing.assert_allclose(moved, loss, rtol=1e-6)
    np.testing.assert_allclose(moved_grad, shuffled(np.asarray(grad)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("k", [3, None])
@pytest.mark.parametrize("matching", ["intra", "inter"])
def test_contrastive_does_not_depend_on_scale_or_on_which_image_comes_first(matching, k):
    embeddings, labels = make_pair(0, "absent_in_one")
    anchors = None if k is None else draw(1, labels, k, False)
    loss, _ = value_and_grad(embeddings, labels, anchors, matching=matching)
    for factor in (0.1, 1e3):  # far above the length of 1e-4 at which a direction gets lost
        scaled, _ = value_and_grad(factor * embeddings, labels, anchors, matching=matching)
        np.testing.assert_allclose(scaled, loss, rtol=1e-5)
    swapped, _ = value_and_grad(
        embeddings[::-1],
        labels[::-1],
        None if anchors is None else anchors[::-1],
        matching=matching,
    )
    np.testing.assert_allclose(swapped, loss, rtol=1e-6)


@pytest.mark.parametrize("matching", ["intra", "inter"])
def test_contrastive_falls_as_classes_separate(matching):
    embeddings, labels = make_pair(0)
    centres = np.eye(NUM_CLASSES, dtype=np.float32)[labels]
    values = [
        float(value_and_grad(embeddings + s * centres, labels, None, matching=matching)[0])
        for s in (0, 1, 3, 10)
    ]
    assert values == sorted(values, reverse=True)
    # Perfectly separated, what is left is the log of the number of equal positives.
    visible = 1 if matching == "intra" else 2
    perfect, _ = value_and_grad(centres, labels, None, matching=matching)
    np.testing.assert_allclose(perfect, math.log(visible), atol=1e-3)


def test_contrastive_pulls_across_images_only_when_matching_across_images():
    # Each image is separated in itself, but the partner's classes lie crosswise.
    labels = np.stack([np.repeat([1, 2], 15).reshape(SHAPE[1:])] * 2)
    labels = labels.astype(np.uint8)
    embeddings = np.eye(NUM_CLASSES, dtype=np.float32)[labels]
    embeddings[1] = embeddings[1][..., [0, 2, 1, 3]]
    intra, _ = value_and_grad(embeddings, labels, None, matching="intra")
    inter, _ = value_and_grad(embeddings, labels, None, matching="inter")
    assert intra < 1e-3
    assert inter > 5


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("k", [3, None])
@pytest.mark.parametrize("matching", ["intra", "inter"])
def test_contrastive_is_finite_with_zero_embeddings_and_missing_classes(matching, k, case):
    embeddings, labels = make_pair(0, case)
    anchors = None if k is None else draw(1, labels, k, False)
    one_zero = embeddings.copy()
    one_zero[0, 1:3] = 0
    # Opposite pixels make a class mean of zero out of embeddings that are not.
    cancelling = np.zeros_like(embeddings)
    for image, y in zip(cancelling, labels, strict=True):
        for c in range(NUM_CLASSES):
            rows, columns = np.nonzero(y == c)
            half = len(rows) // 2
            image[rows[:half], columns[:half]] = 1
            image[rows[half : 2 * half], columns[half : 2 * half]] = -1
    for z in (np.zeros_like(embeddings), one_zero, cancelling):
        loss, grad = value_and_grad(z, labels, anchors, matching=matching)
        assert np.isfinite(loss)
        assert np.isfinite(grad).all()


@pytest.mark.parametrize("k", [3, None])
@pytest.mark.parametrize("matching", ["intra", "inter"])
def test_contrastive_of_background_alone_is_exactly_zero(matching, k):
    embeddings, labels = make_pair(0, "no_foreground")
    anchors = None if k is None else draw(1, labels, k, False)
    loss, grad = value_and_grad(embeddings, labels, anchors, matching=matching)
    assert loss == 0
    assert not np.any(grad)


def equal_class_labels():
    """Classes 1, 2 and 3 have 8 pixels each in either image."""
    labels = np.repeat([0, 1, 2, 3], [6, 8, 8, 8]).astype(np.uint8)
    rng = np.random.default_rng(0)
    return np.stack([rng.permutation(labels).reshape(SHAPE[1:]) for _ in range(2)])


@pytest.mark.parametrize("matching", ["intra", "inter"])
def test_all_pixels_equal_the_enumeration_of_anchors(matching):
    labels = equal_class_labels()
    embeddings = (
        np.random.default_rng(1).normal(size=(*labels.shape, NUM_CLASSES)).astype(np.float32)
    )
    anchors = np.stack([[np.argwhere(y == c) for c in (1, 2, 3)] for y in labels])
    loss, grad = value_and_grad(embeddings, labels, None, matching=matching)
    enumerated, enumerated_grad = value_and_grad(embeddings, labels, anchors, matching=matching)
    np.testing.assert_allclose(loss, enumerated, rtol=1e-6)
    np.testing.assert_allclose(grad, enumerated_grad, rtol=1e-4, atol=1e-6)


def test_all_pixels_are_the_expectation_over_drawn_anchors():
    embeddings, labels = make_pair(0, "absent_in_one")
    labels[0, :4] = 1  # classes of very different size
    loss = functools.partial(losses.local_contrastive_loss, num_classes=NUM_CLASSES)

    @jax.jit
    def drawn(keys):
        sample = functools.partial(
            losses.sample_anchors, num_classes=NUM_CLASSES, pixels_per_class=3
        )
        return jax.vmap(lambda k: loss(embeddings, labels, sample(k, labels)))(keys)

    values = np.asarray(drawn(jax.random.split(jax.random.key(0), 2000)))
    exact = float(value_and_grad(embeddings, labels, None, matching="inter")[0])
    standard_error = values.std() / math.sqrt(values.size)
    assert standard_error < 0.02 * exact
    assert abs(values.mean() - exact) < 4 * standard_error


@pytest.mark.parametrize("include_background", [False, True])
def test_anchors_are_drawn_uniformly_within_their_class_and_with_replacement(include_background):
    _, labels = make_pair(0, "absent_in_one")
    k = 4000
    anchors = np.asarray(draw(3, labels, k, include_background))
    classes = range(0 if include_background else 1, NUM_CLASSES)
    assert anchors.shape == (2, len(classes), k, 2)
    assert np.issubdtype(anchors.dtype, np.integer)
    assert anchors.min() >= 0
    assert (anchors < SHAPE[1:]).all()  # of the absent class too
    for image in range(2):
        for place, c in enumerate(classes):
            members = np.flatnonzero(labels[image] == c)
            pixels = np.ravel_multi_index(tuple(anchors[image, place].T), SHAPE[1:])
            if members.size == 0:
                assert (image, c) == (0, 2)
                continue
            assert set(pixels) == set(members)
            # Far more draws than pixels: only possible with replacement.
            counts = np.bincount(pixels, minlength=labels[image].size)[members]
            expected = k / members.size
            chi_square = np.sum((counts - expected) ** 2 / expected)
            freedom = members.size - 1
            assert chi_square < freedom + 5 * math.sqrt(2 * freedom) + 1


def test_anchors_follow_the_key_and_differ_between_images_and_classes():
    labels = np.stack([equal_class_labels()[0]] * 2)
    first = np.asarray(draw(0, labels, 16, False))
    np.testing.assert_array_equal(draw(0, labels, 16, False), first)
    assert np.any(np.asarray(draw(1, labels, 16, False)) != first)
    assert np.any(first[0, 0] != first[1, 0])
    # By their place within the class, or classes would differ anyhow.
    places = np.cumsum(labels[0].ravel()[:, None] == (1, 2), axis=0) - 1
    ranks = [
        places[np.ravel_multi_index(tuple(first[0, c].T), labels[0].shape), c] for c in range(2)
    ]
    assert np.any(ranks[0] != ranks[1])


def test_random_functions_take_the_key_first_and_options_by_keyword():
    parameters = list(inspect.signature(losses.sample_anchors).parameters.values())
    assert parameters[0].name == "key"
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in parameters[2:])


def test_class_means_are_not_normalised_before_averaging():
    embeddings = jnp.array([[[1.0, 0.0], [0.0, 9.0], [4.0, 4.0]]])
    means, present = losses.class_means(embeddings, jnp.array([[1, 1, 3]]), num_classes=4)
    np.testing.assert_allclose(means, [[0, 0], [0.5, 4.5], [0, 0], [4, 4]])
    np.testing.assert_array_equal(present, [False, True, False, True])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"matching": "both"}, "'both'.*intra, inter, batch"),
        ({"embeddings": jnp.zeros((3, 2, 6, 5, 3))}, r"vmap over pairs.*\(3, 2, 6, 5, 3\)"),
        ({"embeddings": jnp.zeros((3, 6, 5, 3))}, r"\[2, H, W, E\].*\(3, 6, 5, 3\)"),
        ({"labels": jnp.zeros((2, 5, 6), int)}, r"\(2, 5, 6\)"),
        ({"anchors": jnp.zeros((2, 4, 3, 2), int)}, r"\[2, 3, K, 2\].*\(2, 4, 3, 2\)"),
        ({"anchors": jnp.zeros((2, 3, 3), int)}, r"\[2, 3, K, 2\].*\(2, 3, 3\)"),
        (
            {"anchors": jnp.zeros((2, 3, 3, 2), int), "include_background": True},
            r"\[2, 4, K, 2\].*\(2, 3, 3, 2\)",
        ),
    ],
)
def test_contrastive_names_what_does_not_fit(change, message):
    embeddings, labels = make_pair(0)
    arguments = {"embeddings": embeddings, "labels": labels, "anchors": None}
    with pytest.raises(ValueError, match=message):
        losses.local_contrastive_loss(**(arguments | change), num_classes=NUM_CLASSES)


def random_segmentation(seed=0, num_classes=3):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(2, 4, 5, num_classes)).astype(np.float32)
    return logits, rng.integers(0, num_classes, (2, 4, 5)).astype(np.uint8)


def test_dice_by_hand():
    # Two pixels, probabilities (3/4, 1/4) each, labels 0 and 1:
    # class 0: 2 * 3/4 / (3/2 + 1) = 0.6; class 1: 2 * 1/4 / (1/2 + 1) = 1/3.
    logits = jnp.log(jnp.array([[[[3.0, 1.0], [3.0, 1.0]]]]))
    labels = jnp.array([[[0, 1]]])
    np.testing.assert_allclose(losses.dice_loss(logits, labels), [1 - (0.6 + 1 / 3) / 2], atol=1e-5)
    foreground = losses.dice_loss(logits, labels, include_background=False)
    np.testing.assert_allclose(foreground, [1 - 1 / 3], atol=1e-5)


@pytest.mark.parametrize("include_background", [False, True])
def test_dice_equals_a_loop_over_images_and_classes(include_background):
    logits, labels = random_segmentation()
    labels[0][labels[0] == 2] = 1  # absent from the label, not from the prediction
    expected = []
    for z, y in zip(logits.astype(np.float64), labels, strict=True):
        p = np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True)
        dice = [
            (2 * p[y == c, c].sum() + 1e-5) / (p[..., c].sum() + (y == c).sum() + 1e-5)
            for c in range(0 if include_background else 1, 3)
        ]
        expected.append(1 - np.mean(dice))
    loss = losses.dice_loss(logits, labels, include_background=include_background)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_dice_of_a_perfect_prediction_is_zero_and_of_a_wrong_one_is_one():
    _, labels = random_segmentation()
    labels[0] = 0  # a class absent from label and prediction counts as Dice 1
    onehot = np.eye(3, dtype=np.float32)[labels]
    np.testing.assert_allclose(losses.dice_loss(100 * onehot, labels), [0, 0], atol=1e-5)
    two_classes = np.where(labels == 0, 0, 1)
    wrong = np.eye(2, dtype=np.float32)[1 - two_classes]
    np.testing.assert_allclose(losses.dice_loss(100 * wrong, two_classes)[1], 1, atol=1e-5)


def test_batch_dice_equals_a_loop_over_classes():
    logits, labels = random_segmentation()
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(axis=-1, keepdims=True)
    dice = [
        (2 * p[labels == c, c].sum() + 1e-5) / (p[..., c].sum() + (labels == c).sum() + 1e-5)
        for c in range(3)
    ]
    loss = losses.batch_dice_loss(logits, labels)
    assert loss.shape == () and loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, 1 - np.mean(dice), rtol=1e-5)


def test_batch_dice_punishes_a_false_positive_in_an_empty_slice():
    """The gradient on a pixel that wrongly shows a class: some in the batch's, none by slice."""
    labels = np.zeros((2, 8, 8), int)
    labels[1, 2:6, 2:6] = 1
    logits = 6.0 * np.eye(2, dtype=np.float32)[labels]
    logits[0, 3, 3] = (0, 6)
    by_slice = jax.grad(lambda z: jnp.mean(losses.dice_loss(z, labels)))(logits)
    by_batch = jax.grad(lambda z: losses.batch_dice_loss(z, labels))(logits)
    logits[0, 3, 3] = (0, 0)  # unsure: where softmax has its largest slope
    by_slice_unsure = jax.grad(
        lambda z: jnp.mean(losses.dice_loss(z, labels, include_background=False))
    )(logits)
    by_batch_unsure = jax.grad(lambda z: losses.batch_dice_loss(z, labels))(logits)
    assert by_batch[0, 3, 3, 1] > 0 and by_batch_unsure[0, 3, 3, 1] > 1e-3
    assert by_batch[0, 3, 3, 1] > 2 * by_slice[0, 3, 3, 1]
    assert abs(by_slice_unsure[0, 3, 3, 1]) < 1e-4


def test_cross_entropy_equals_optax_and_weighs_by_the_true_class():
    logits, labels = random_segmentation()
    weights = np.array([0.1, 1.0, 4.0], np.float32)
    per_pixel = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels, int))
    expected = np.mean(weights[labels] * per_pixel, axis=(1, 2))
    loss = losses.cross_entropy_loss(logits, labels, class_weights=weights)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_cross_entropy_by_hand():
    # Pixels of label 0 and 1 at probabilities (3/4, 1/4), weights 1 and 2:
    # (-log(3/4) - 2 log(1/4)) / 2 = (0.28768 + 2.77259) / 2
    logits = jnp.log(jnp.array([[[[3.0, 1.0], [3.0, 1.0]]]]))
    loss = losses.cross_entropy_loss(logits, jnp.array([[[0, 1]]]), class_weights=(1.0, 2.0))
    np.testing.assert_allclose(loss, [1.53014], atol=1e-5)


@pytest.mark.parametrize(
    "loss",
    [
        losses.dice_loss,
        functools.partial(losses.dice_loss, include_background=False),
        functools.partial(losses.cross_entropy_loss, class_weights=(1.0, 0.0, 2.0)),
    ],
)
@pytest.mark.parametrize("scale", [0, 1, 1e4])
def test_segmentation_losses_are_finite_when_classes_are_absent(loss, scale):
    logits, labels = random_segmentation()
    labels[:] = 0
    value, grad = jax.value_and_grad(lambda z: jnp.sum(loss(z, labels)))(scale * logits)
    assert np.isfinite(value)
    assert np.isfinite(grad).all()


def test_pixels_of_no_class_count_nowhere():
    """An ignored row: value as without the row, gradient zero in it."""
    logits, labels = random_segmentation()
    cut, cut_labels = logits[:, 1:], labels[:, 1:]
    labels = labels.astype(np.uint8)
    labels[:, 0] = losses.IGNORE
    for loss in (
        losses.dice_loss,
        losses.batch_dice_loss,
        lambda z, y: losses.cross_entropy_loss(z, y, class_weights=(0.5, 1.0, 3.0)),
        lambda z, y: losses.dice_loss(z, y, include_background=False),
    ):
        np.testing.assert_allclose(loss(logits, labels), loss(cut, cut_labels), rtol=1e-5)
        grad = jax.grad(lambda z, loss=loss: jnp.sum(loss(z, labels)))(logits)
        expected = jax.grad(lambda z, loss=loss: jnp.sum(loss(z, cut_labels)))(cut)
        assert not np.any(grad[:, 0])
        np.testing.assert_allclose(grad[:, 1:], expected, rtol=1e-4, atol=1e-7)


def test_cross_entropy_divides_by_the_pixels_that_count():
    """One row of four is ignored; four equal classes: log 4 = 1.386 a pixel, not 3/4 of it."""
    labels = np.zeros((1, 4, 4), np.uint8)
    labels[:, 0] = losses.IGNORE
    equal = losses.cross_entropy_loss(np.zeros((1, 4, 4, 4)), labels, class_weights=np.ones(4))
    np.testing.assert_allclose(equal, [math.log(4)], rtol=1e-6)
    # The divisor is the number of pixels, not the sum of their weights.
    double = losses.cross_entropy_loss(np.zeros((1, 4, 4, 4)), labels, class_weights=[2, 9, 9, 9])
    np.testing.assert_allclose(double, [2 * math.log(4)], rtol=1e-6)


@pytest.mark.parametrize(
    "loss",
    [
        losses.dice_loss,
        losses.batch_dice_loss,
        functools.partial(losses.dice_loss, include_background=False),
        functools.partial(losses.cross_entropy_loss, class_weights=(1.0, 1.0, 1.0)),
    ],
)
def test_nothing_to_count_is_no_loss(loss):
    logits, labels = random_segmentation()
    labels[:] = losses.IGNORE
    value, grad = jax.value_and_grad(lambda z: jnp.sum(loss(z, labels)))(logits)
    assert value == 0
    assert not np.any(grad)


@pytest.mark.parametrize(
    "loss",
    [
        losses.dice_loss,
        losses.batch_dice_loss,
        functools.partial(losses.cross_entropy_loss, class_weights=(1.0, 1.0, 1.0)),
    ],
)
@pytest.mark.parametrize("shape", [(2, 5, 4), (2, 4, 5, 3), (1, 4, 5)])
def test_segmentation_losses_name_what_does_not_fit(loss, shape):
    logits, _ = random_segmentation()
    with pytest.raises(ValueError, match=r"logits \(2, 4, 5, 3\) and labels .*not one-hot"):
        loss(logits, jnp.zeros(shape, int))


@pytest.mark.parametrize("weights", [(), (1.0,), (1.0, 1.0), (1.0,) * 4, 2.0])
def test_class_weights_are_one_per_class(weights):
    logits, labels = random_segmentation()
    with pytest.raises(ValueError, match=r"class_weights .*wanted \[3\], one per class"):
        losses.cross_entropy_loss(logits, labels, class_weights=weights)


def test_class_means_and_anchors_name_what_does_not_fit():
    with pytest.raises(ValueError, match=r"\(2, 6, 5, 4\).*vmap over images"):
        losses.class_means(jnp.zeros((2, 6, 5, 4)), jnp.zeros((2, 6, 5), int), num_classes=3)
    key, labels = jax.random.key(0), jnp.zeros((2, 6, 5), int)
    with pytest.raises(ValueError, match=r"vmap over pairs\); found \(6, 5\)"):
        losses.sample_anchors(key, labels[0], num_classes=3, pixels_per_class=3)
    with pytest.raises(ValueError, match=r"pixels_per_class is 0.*anchors=None"):
        losses.sample_anchors(key, labels, num_classes=3, pixels_per_class=0)


@pytest.mark.parametrize("include_background", [False, True])
def test_contrastive_loss_without_pixels_of_no_class(include_background):
    rng = np.random.default_rng(5)
    z = rng.normal(size=(2, 6, 5, 4)).astype(np.float32)
    y = rng.integers(0, 3, (2, 6, 5))
    options = {"num_classes": 3, "include_background": include_background}
    expected = losses.local_contrastive_loss(z[:, 2:], y[:, 2:], None, **options)
    y[:, :2] = losses.IGNORE
    value, grad = jax.value_and_grad(
        lambda z: losses.local_contrastive_loss(z, y, None, **options)
    )(z)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert not np.any(grad[:, :2])
