"""Terms of the online methods, on a network of nine numbers, against NumPy from their formulas.

The network is pointwise but for the mean of all images of its pass, which stands for BatchNorm: a
wrong company of slices gives other logits. Letters: n slices, H W pixels, C classes.
"""

import functools
import importlib
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from lclseg import steps
from lclseg.data.batches import Pool
from lclseg.losses import IGNORE
from lclseg.methods import contract
from lclseg.methods.base import segmentation_loss
from lclseg.methods.contract import Base, Slices

CONFIGS = Path(__file__).parents[1] / "configs" / "methods"
METHODS = ("mean_teacher", "uncertainty_aware_mean_teacher", "cps", "fixmatch", "unimatch")
NUM_CLASSES, SIZE, NUM_SLICES = 3, 12, 4
AXIS = "devices"
KEY = jax.random.key(3)
PROGRESS = 0.5
RAMP = np.exp(-5 * (1 - PROGRESS) ** 2)


class StubNet:
    """softmax(slope x + offset + shift x mean of the pass); remembers what each pass was given."""

    def __init__(self, axis_name=None):
        self.axis_name = axis_name
        self.passes = []

    def __call__(self, params, batch_stats, images, heads, *, dropout=None):
        self.passes.append((images, dropout or {}))
        mean = jnp.mean(jnp.concatenate(list(images.values())))
        if self.axis_name is not None:
            mean = jax.lax.pmean(mean, self.axis_name)
        found = {}
        for group, image in images.items():
            assert heads[group] == ("segmentation",)
            factor = 0.5 if group in (dropout or {}) else 1.0  # stands for dropped features
            vectors = {k: v[None, None, None] for k, v in params.items()}
            logits = factor * vectors["slope"] * image[..., None] + vectors["offset"]
            found[group] = {"segmentation": logits + vectors["shift"] * mean}
        return found, {"mean": mean}


def probs_of(params, images, dropped=()):
    """What StubNet gives, in float64: probabilities [n, H, W, C] by group."""
    images = {group: np.asarray(image, np.float64) for group, image in images.items()}
    mean = np.concatenate(list(images.values())).mean()
    found = {}
    for group, image in images.items():
        factor = 0.5 if group in dropped else 1.0
        logits = factor * image[..., None] * params["slope"] + params["offset"]
        scores = np.exp(logits + params["shift"] * mean)
        found[group] = scores / scores.sum(axis=-1, keepdims=True)
    return found


def mirrored(key, image, label):
    return image[:, ::-1], label[:, ::-1]


def brighter(key, image, label):
    return image + jax.random.uniform(key, (), minval=0.1, maxval=0.6), label


def halved(key, image, label):
    return image / 2, label


BASE = Base(
    num_classes=NUM_CLASSES,
    segmentation=lambda logits, label, axis_name: segmentation_loss(
        logits,
        label,
        kind="batch_dice_and_cross_entropy",
        class_weights=(),
        axis_name=axis_name,
    ),
    labeled_view=halved,
    move=mirrored,
    change=brighter,
    unlabeled_batch_size=NUM_SLICES,
    embedding_dim=4,
)


def options_of(name, **changes):
    options = ConfigDict(runpy.run_path(str(CONFIGS / f"{name}.py"))["OPTIONS"])
    if "threshold" in options:
        options.threshold = 0.7
    options.update(changes)
    return options


def method_of(name, **changes):
    module = importlib.import_module(f"lclseg.methods.{name}")
    return module.make(options_of(name, **changes), BASE)


def draw_params(seed):
    rng = np.random.default_rng(seed)
    scale = {"slope": 3.0, "offset": 0.5, "shift": 0.5}
    return {name: s * rng.normal(size=NUM_CLASSES) for name, s in scale.items()}


def state_of(name):
    """A state in the middle of its stage, whose averaged weights are not its weights."""

    def several(seed):
        if name != "cps":
            return draw_params(seed)
        both = draw_params(seed), draw_params(seed + 1)
        return {k: np.stack([one[k] for one in both]) for k in both[0]}

    to_jax = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.float32))
    return steps.TrainState(
        step=jnp.asarray(30, jnp.int32),
        stage=jnp.asarray([10, 40], jnp.int32),
        params=to_jax(several(0)),
        batch_stats={"mean": jnp.zeros(2 if name == "cps" else ())},
        opt_state=(),
        ema_params=to_jax(several(5)),
    )


def groups_of(name):
    """Four labelled slices, of which one has no label at all, and unlabelled ones."""
    rng = np.random.default_rng(1)
    label = rng.integers(0, NUM_CLASSES, (NUM_SLICES, SIZE, SIZE)).astype(np.uint8)
    label[0] = IGNORE
    label[1, :3] = IGNORE
    count = 2 * NUM_SLICES if name == "unimatch" else NUM_SLICES

    def image(n):
        return jnp.asarray(rng.normal(0, 1, (n, SIZE, SIZE)), jnp.float32)

    nothing = jnp.full((count, SIZE, SIZE), IGNORE, jnp.uint8)
    return {
        "labeled": Slices(image(NUM_SLICES), jnp.asarray(label), jnp.ones(NUM_SLICES, bool)),
        "unlabeled": Slices(image(count), nothing, jnp.zeros(count, bool)),
    }


class Case:
    """A method's terms on its batch: what they gave, and what the network saw."""

    def __init__(self, name, **changes):
        self.options = options_of(name, **changes)
        self.method = method_of(name, **changes)
        self.state, groups = state_of(name), groups_of(name)
        self.batch = steps.make_views(KEY, groups, self.method.views, None)
        self.raw = groups
        self.net = StubNet()
        with jax.disable_jit(name == "uncertainty_aware_mean_teacher"):  # its loop, pass by pass
            self.terms, self.batch_stats = self.run(self.net, self.state.params)
        self.loss, self.parts = steps.total_loss(self.terms, None)

    def run(self, net, params):
        return self.method.terms(net, params, self.state, self.batch, KEY)

    def gradient(self):
        def loss(params):
            return steps.total_loss(self.run(StubNet(), params)[0], None)[0]

        return jax.jit(jax.grad(loss))(self.state.params)

    def images(self, view):
        return np.asarray(self.batch[view].image, np.float64)

    @property
    def label(self):
        return np.asarray(self.batch["labeled"].label)


def numbers(params):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


# --- losses, slice by slice ----------------------------------------------------------------------


def cross_entropies(probs, label):
    """Of each slice, the mean over its pixels that have a label; 0 where none has."""
    found = []
    for p, y in zip(probs, label, strict=True):
        each = [-np.log(p[i, j, y[i, j]]) for i, j in np.argwhere(y != IGNORE)]
        found.append(np.mean(each) if each else 0.0)
    return np.array(found)


def batch_dice(probs, label):
    """1 - mean over classes of the soft Dice of all labelled pixels of all slices."""
    p, y = probs[label != IGNORE], label[label != IGNORE]
    dice = []
    for c in range(NUM_CLASSES):
        overlap, total = p[y == c, c].sum(), p[:, c].sum() + (y == c).sum()
        dice.append((2 * overlap + 1e-5) / (total + 1e-5))
    return 1 - np.mean(dice)


def supervised(probs, label):
    has_label = (label != IGNORE).any(axis=(1, 2))
    return cross_entropies(probs, label)[has_label].mean() + batch_dice(probs, label)


def confident(probs, threshold):
    label = probs.argmax(axis=-1)
    label[probs.max(axis=-1) < threshold] = IGNORE
    return label


# --- the formulas: (case, weights, weights of what makes the labels) -> loss ----------------------


def mean_teacher(case, params, frozen):
    probs = probs_of(params, {k: case.images(k) for k in ("labeled", "unlabeled")})
    teacher = probs_of(numbers(case.state.ema_params), {"noisy": case.images("noisy")})["noisy"]
    consistency = np.mean((probs["unlabeled"] - teacher) ** 2)
    return supervised(probs["labeled"], case.label) + 0.1 * RAMP * consistency


def certain_pixels(case):
    """[n, H, W] bool, and the target, from the noisy images that the teacher was seen to get."""
    seen = [images["unlabeled"] for images, _ in case.net.passes if "labeled" not in images]
    target, *others = [
        probs_of(numbers(case.state.ema_params), {"unlabeled": x})["unlabeled"] for x in seen
    ]
    assert len(others) == case.options.passes
    mean = sum(others) / len(others)
    entropy = -(mean * np.log(mean)).sum(axis=-1)
    return entropy < (0.75 + 0.25 * RAMP) * np.log(NUM_CLASSES), target


def uncertainty_aware_mean_teacher(case, params, frozen):
    probs = probs_of(params, {k: case.images(k) for k in ("labeled", "unlabeled")})
    certain, target = certain_pixels(case)
    squared = ((probs["unlabeled"] - target) ** 2).mean(axis=-1)
    consistency = squared[certain].sum() / certain.sum()
    return supervised(probs["labeled"], case.label) + 0.1 * RAMP * consistency


def cps(case, params, frozen):
    images = {k: case.images(k) for k in ("labeled", "unlabeled")}

    def both(params):
        return [probs_of({k: v[i] for k, v in params.items()}, images) for i in (0, 1)]

    a, b = both(params)
    by_a, by_b = (one["unlabeled"].argmax(axis=-1) for one in both(frozen))
    crossed = cross_entropies(a["unlabeled"], by_b) + cross_entropies(b["unlabeled"], by_a)
    labeled = [supervised(one["labeled"], case.label) for one in (a, b)]
    return sum(labeled) + 0.1 * RAMP * crossed.mean()


def fixmatch(case, params, frozen):
    teacher = probs_of(numbers(case.state.ema_params), {"weak": case.images("weak")})["weak"]
    probs = probs_of(params, {k: case.images(k) for k in ("labeled", "strong")})
    label = confident(teacher, case.options.threshold)
    return supervised(probs["labeled"], case.label) + supervised(probs["strong"], label)


def student_pass(case):
    """The images of the pass with gradient, the dropout, and where each strong view is its own."""
    ((images, dropout),) = [one for one in case.net.passes if "labeled" in one[0]]
    own = {k: np.asarray(images[k]) == case.images(k)[::2] for k in ("strong_1", "strong_2")}
    for name, mask in own.items():
        pasted = case.images(name)[1::2]
        np.testing.assert_array_equal(np.asarray(images[name])[~mask], pasted[~mask])
    return images, dropout, own


def unimatch(case, params, frozen):
    images, dropout, own = student_pass(case)
    probs = probs_of(params, images, dropped=list(dropout))
    threshold = case.options.threshold
    label = confident(probs_of(frozen, images, dropped=list(dropout))["weak"], threshold)
    partner = probs_of(frozen, {"partner": case.images("unlabeled")[1::2]})["partner"]
    partner_label = confident(partner, threshold)
    one, two = (
        batch_dice(probs[name], np.where(own[name], label, partner_label))
        for name in ("strong_1", "strong_2")
    )
    unlabeled = one / 4 + two / 4 + batch_dice(probs["dropped"], label) / 2
    return (supervised(probs["labeled"], case.label) + unlabeled) / 2


FORMULAS = {
    function.__name__: function
    for function in (mean_teacher, uncertainty_aware_mean_teacher, cps, fixmatch, unimatch)
}


@functools.cache
def case_of(name):
    return Case(name)


@pytest.mark.parametrize("name", METHODS)
def test_loss_is_the_formula(name):
    case = case_of(name)
    params = numbers(case.state.params)
    np.testing.assert_allclose(case.loss, FORMULAS[name](case, params, params), rtol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_gradient_is_that_of_the_formula_with_fixed_labels(name):
    """So none flows into a teacher, nor into what makes a label; by central differences."""
    case = case_of(name)
    params, found = numbers(case.state.params), case.gradient()
    for key, leaf in params.items():
        for index in np.ndindex(leaf.shape):

            def moved(by, key=key, index=index):
                changed = {k: v.copy() for k, v in params.items()}
                changed[key][index] += by
                return FORMULAS[name](case, changed, params)

            slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
            np.testing.assert_allclose(found[key][index], slope, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("name", METHODS)
def test_labeled_and_unlabeled_slices_share_the_pass_whose_statistics_are_kept(name):
    case = case_of(name)
    together = [images for images, _ in case.net.passes if "labeled" in images]
    assert len(together) == (2 if name == "cps" else 1)  # a pass for each network
    mean = np.concatenate([np.asarray(x) for x in together[0].values()]).mean()
    np.testing.assert_allclose(
        case.batch_stats["mean"], np.full_like(case.batch_stats["mean"], mean), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mean_teacher", {"segmentation_loss": 1, "consistency_loss": 0.1 * RAMP}),
        (
            "uncertainty_aware_mean_teacher",
            {"segmentation_loss": 1, "consistency_loss": 0.1 * RAMP},
        ),
        ("cps", {"segmentation_loss": 1, "pseudo_label_loss": 0.1 * RAMP}),
        ("fixmatch", {"segmentation_loss": 1, "pseudo_label_loss": 1}),
        (
            "unimatch",
            {"segmentation_loss": 1 / 2, "strong_view_loss": 1 / 4, "feature_dropout_loss": 1 / 4},
        ),
    ],
)
def test_weights(name, expected):
    weights = {term: float(found.weight) for term, found in case_of(name).terms.items()}
    assert weights == pytest.approx(expected)


@pytest.mark.parametrize("name", METHODS)
def test_hidden_truth_of_unlabeled_slices_is_never_read(name):
    case = case_of(name)
    batch = {
        view: slices if view == "labeled" else slices._replace(label=jnp.full_like(slices.label, 1))
        for view, slices in case.batch.items()
    }
    terms, _ = case.method.terms(StubNet(), case.state.params, case.state, batch, KEY)
    np.testing.assert_allclose(steps.total_loss(terms, None)[0], case.loss, rtol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_four_devices_give_the_loss_and_the_gradient_of_one(name):
    """Augmentation, noise and masks are drawn within the mapped function."""
    method, state, groups = method_of(name), state_of(name), groups_of(name)

    def one_device(groups):
        batch = steps.make_views(KEY, groups, method.views, AXIS)

        def loss(params):
            terms, _ = method.terms(StubNet(AXIS), params, state, batch, KEY)
            return steps.total_loss(terms, AXIS)[0]

        return jax.lax.psum(jax.value_and_grad(loss)(state.params), AXIS)

    def over(num_devices):
        devices = jax.local_devices()[:num_devices]
        shards = jax.tree.map(lambda x: x.reshape(num_devices, -1, *x.shape[1:]), groups)
        found = jax.pmap(one_device, axis_name=AXIS, devices=devices)(shards)
        return jax.tree.leaves(jax.tree.map(lambda x: np.asarray(x[0]), found))

    for one, four in zip(over(1), over(4), strict=True):
        np.testing.assert_allclose(one, four, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_unlabeled_slices_are_drawn_from_the_unlabeled_pool(name):
    records, count = np.arange(100, 120), 8 if name == "unimatch" else 4
    labeled, unlabeled = (Pool(r, np.zeros((len(r), 3), int)) for r in (np.arange(9), records))
    draw = method_of(name).sampler(labeled, unlabeled)
    drawn = [draw(np.random.default_rng(seed)) for seed in range(200)]
    assert all(set(one) == {"unlabeled"} for one in drawn)
    rows = np.array([one["unlabeled"] for one in drawn])
    assert rows.shape == (200, count)
    assert set(rows.ravel()) == set(records)
    assert all(len(set(row)) == count for row in rows)  # so no slice is its own partner


# --- views and masks -----------------------------------------------------------------------------


def moved(case):
    return np.asarray(case.raw["unlabeled"].image)[:, :, ::-1]


@pytest.mark.parametrize("name", METHODS)
def test_the_weak_view_is_moved_alone_and_the_labeled_view_is_the_shared_one(name):
    case = case_of(name)
    weak = "weak" if name == "fixmatch" else "unlabeled"
    np.testing.assert_array_equal(case.images(weak), moved(case))
    np.testing.assert_allclose(case.images("labeled"), np.asarray(case.raw["labeled"].image) / 2)


@pytest.mark.parametrize(
    ("name", "views"), [("fixmatch", ["strong"]), ("unimatch", ["strong_1", "strong_2"])]
)
def test_strong_views_are_changes_of_the_weak_one(name, views):
    case = case_of(name)
    changes = [case.images(view) - moved(case) for view in views]
    for change in changes:
        brightness = change[:, :1, :1]
        np.testing.assert_allclose(change, np.broadcast_to(brightness, change.shape), atol=1e-6)
        assert (brightness > 0.09).all() and np.ptp(brightness) > 0.1
    if len(changes) > 1:
        assert np.abs(changes[0] - changes[1]).max() > 0.1


def test_confident_labels_are_some_and_not_all():
    """Or the tests above would not tell a mask from none."""
    for name, params, view in (("fixmatch", "ema_params", "weak"), ("unimatch", "params", None)):
        case = case_of(name)
        images = {view: case.images(view)} if view else student_pass(case)[0]
        probs = probs_of(numbers(getattr(case.state, params)), images)[view or "weak"]
        share = (confident(probs, case.options.threshold) != IGNORE).mean()
        assert 0.2 < share < 0.9
    certain, _ = certain_pixels(case_of("uncertainty_aware_mean_teacher"))
    assert 0.1 < certain.mean() < 0.9


@pytest.mark.parametrize("name", ["fixmatch", "unimatch"])
def test_without_a_confident_pixel_the_labeled_slices_teach_alone(name):
    case = Case(name, threshold=1.1)
    for term, value in case.parts.items():
        assert (value > 0.1) if term == "segmentation_loss" else (value == 0), term
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(case.gradient()))


def test_without_a_certain_pixel_there_is_no_consistency():
    case = Case("uncertainty_aware_mean_teacher", start=-9.0)
    assert case.parts["consistency_loss"] == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(case.gradient()))


def test_the_mean_teacher_alone_sees_clipped_noise():
    case = case_of("mean_teacher")
    (student, _), (teacher, _) = case.net.passes
    np.testing.assert_array_equal(student["unlabeled"], case.images("unlabeled"))
    noise = np.asarray(teacher["unlabeled"]) - case.images("unlabeled")
    np.testing.assert_array_equal(teacher["unlabeled"], case.images("noisy"))
    assert np.abs(noise).max() == pytest.approx(0.2, abs=1e-5)
    assert noise.std() == pytest.approx(0.096, rel=0.1)  # of a normal of 0.1, clipped at 0.2


def test_every_pass_of_the_uncertain_teacher_has_its_own_noise():
    case = case_of("uncertainty_aware_mean_teacher")
    seen = [images["unlabeled"] for images, _ in case.net.passes if "labeled" not in images]
    noises = np.array(seen) - case.images("unlabeled")
    assert np.abs(noises).max() <= 0.2 + 1e-6
    assert np.abs(np.corrcoef(noises.reshape(len(seen), -1)) - np.eye(len(seen))).max() < 0.2


def test_unimatch_pastes_boxes_of_the_partner_and_drops_features_of_one_group():
    images, dropout, own = student_pass(Case("unimatch", cutmix_probability=1.0))
    assert set(dropout) == {"dropped"}
    np.testing.assert_array_equal(images["dropped"], images["weak"])
    for mask in (*own["strong_1"], *own["strong_2"]):
        box = np.argwhere(~mask)
        assert len(box) == np.prod(np.ptp(box, axis=0) + 1) > 0
    assert np.any(own["strong_1"] != own["strong_2"])
    _, _, own = student_pass(Case("unimatch", cutmix_probability=0.0))
    assert own["strong_1"].all() and own["strong_2"].all()


def test_cps_trains_both_networks_on_labeled_slices_first():
    method, state, groups = method_of("cps"), state_of("cps"), groups_of("cps")
    assert method.networks == 2 and not method.offline
    terms, views = method.pretraining
    assert set(views) == {"labeled"}
    batch = steps.make_views(KEY, groups, views, None)
    found, _ = terms(StubNet(), state.params, state, batch, KEY)
    image, label = np.asarray(batch["labeled"].image), np.asarray(batch["labeled"].label)
    params = numbers(state.params)
    expected = sum(
        supervised(
            probs_of({k: v[i] for k, v in params.items()}, {"labeled": image})["labeled"], label
        )
        for i in (0, 1)
    )
    np.testing.assert_allclose(steps.total_loss(found, None)[0], expected, rtol=1e-5)


# --- what the methods share ----------------------------------------------------------------------


def test_no_gradient_reaches_a_teacher():
    """Its probabilities are soft, so that one would."""
    images = {"unlabeled": groups_of("fixmatch")["unlabeled"].image}

    def confidence(params):
        return contract.teacher_probs(StubNet(), params, {}, images)["unlabeled"][..., 0].sum()

    for leaf in jax.tree.leaves(jax.grad(confidence)(state_of("fixmatch").params)):
        np.testing.assert_array_equal(leaf, 0)


def test_ramp_rises_to_one():
    found = [float(contract.ramp_up(jnp.asarray(t))) for t in (0.0, 0.5, 1.0)]
    assert found == pytest.approx([np.exp(-5), np.exp(-1.25), 1.0])


def test_confident_label_keeps_what_reaches_the_threshold():
    probs = jnp.array([[[[0.5, 0.25, 0.25], [0.25, 0.25, 0.5], [0.125, 0.75, 0.125]]]])
    for threshold, expected in ((0.5, [0, 2, 1]), (0.75, [IGNORE, IGNORE, 1])):
        label = contract.confident_label(probs, threshold)
        assert label.dtype == jnp.uint8
        np.testing.assert_array_equal(label, [[expected]])


def test_slices_are_drawn_with_replacement_only_where_there_are_too_few():
    rng = np.random.default_rng(0)
    assert len(set(contract.draw_from(np.arange(8), rng, 8))) == 8
    assert len(contract.draw_from(np.arange(3), rng, 8)) == 8
