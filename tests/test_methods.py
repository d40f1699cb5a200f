"""What every method must do, whichever it is: one module over all files of lclseg/methods/.

A new method is tested without an edit here. Steps run on a tiny batch with cheap augmentation; runs
are of a few steps on phantom volumes.
"""

import collections
import dataclasses
import functools
import importlib
import json
import runpy
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_run import logged

from benchmarks import floor
from lclseg import evaluation, model_files, predict, steps, train
from lclseg.data.batches import Pool, sampler
from lclseg.losses import IGNORE
from lclseg.methods import base as bases
from lclseg.models import Net, UNet
from lclseg.run import checkpoint, devices, setup
from lclseg.run.stopping import Interrupted
from tfds_builders.phantom import phantom_dataset_builder as phantom

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
METHODS = sorted(path.stem for path in (CONFIGS / "methods").glob("*.py"))
# Whole runs take a method half a minute. These differ in what a run does with them: rounds with
# pseudo-labels, a first stage of its own, two networks; --slow runs all.
VARIED = ("local_contrastive", "bcp", "cps")
RUNS = [pytest.param(name, marks=() if name in VARIED else pytest.mark.slow) for name in METHODS]
AXIS = "devices"
SIZE, NUM_CLASSES = 16, 3
KEY = jax.random.key(11)
LABELED, UNLABELED = np.arange(6), np.arange(6, 16)
POISON = 254


def jitter(key, image, label):
    return image * jax.random.uniform(key, (), minval=0.8, maxval=1.2), label


def shift(key, image, label):
    """Moves both by up to two pixels; background comes in."""
    offset = jax.random.randint(key, (2,), 0, 5)

    def cut(x):
        padded = jnp.pad(x, 2)
        return jax.lax.dynamic_slice(padded, offset, x.shape)

    return cut(image), cut(label)


def cheap_augmentation(options):
    """In place of the real one, which is tested for itself and compiles for long."""
    return jitter, shift, jitter


@pytest.fixture(autouse=True, scope="module")
def _cheap():
    with mock.patch.object(bases, "augmentation", cheap_augmentation):
        yield


def small(config):
    """Sizes of a config that four devices share."""
    config.model.embedding_dim = 4
    config.data.labeled_batch_size = config.data.unlabeled_batch_size = 4
    if "pairs" in config.method:
        config.method.pairs.update(dict.fromkeys(config.method.pairs, 1))
        config.method.view_min_classes = 1
    return config


@functools.cache
def make(name):
    """(method, base) of a tiny config."""
    config = small(runpy.run_path(str(CONFIGS / "default.py"))["get_config"](name))
    with mock.patch.object(bases, "augmentation", cheap_augmentation):
        return bases.method_of(config, NUM_CLASSES), bases.base_of(config, NUM_CLASSES)


def filters_of(method):
    """Two levels, or as many as the method's heads read: few are compiled in little time."""
    made = [head(dtype=jnp.float32, axis_name=None) for head in method.heads.values()]
    deepest = max((getattr(head, "level", 0) for head in made), default=0)
    return (4,) * max(1, deepest) + (8,)


class Kind:
    """One kind of stage of a method: what it trains, and on which groups."""

    def __init__(self, name, kind):
        method, _ = make(name)
        self.method = method
        self.terms, self.views, self.draw = method.terms, method.views, method.sampler
        if kind == "first":
            (self.terms, self.views), self.draw = method.pretraining, None

    def rows(self, store, step=0):
        """Rows of the store by group, as training draws them."""
        is_known = (store.label != IGNORE).any((1, 2))
        counts = np.stack(
            [(store.label == k).sum((1, 2)) * is_known for k in range(NUM_CLASSES)], axis=1
        )
        pools = [Pool(r, counts[r]) for r in (LABELED, UNLABELED)]
        draw = self.draw(*pools) if self.draw else None
        return sampler(3, LABELED, 4, draw)(step)

    def step(self, optimizer, axis_name=None, dtype=jnp.float32):
        model = UNet(
            NUM_CLASSES,
            filters=filters_of(self.method),
            heads=self.method.heads,
            dtype=dtype,
            axis_name=axis_name,
        )
        return functools.partial(
            steps.train_step,
            net=Net(model),
            terms=self.terms,
            views=self.views,
            optimizer=optimizer,
            ema_decay=0.9,
            remember=self.method.remember,
        )

    def state(self, optimizer):
        """At step 5 of a stage of 10: a ramp-up has begun."""
        state = steps.create_train_state(
            jax.random.key(0),
            UNet(NUM_CLASSES, filters=filters_of(self.method), heads=self.method.heads),
            optimizer,
            image_size=SIZE,
            networks=self.method.networks,
            init_memory=self.method.init_memory,
        )
        return state.replace(step=jnp.array(5, jnp.int32), stage=jnp.array([0, 10], jnp.int32))


# The first stage is a method's own where it has a pretraining; that of cps has no term of its own.
VARIED_KINDS = (*((name, "joint") for name in VARIED), ("bcp", "first"))
KINDS = [
    pytest.param(name, kind, marks=() if (name, kind) in VARIED_KINDS else pytest.mark.slow)
    for name in METHODS
    for kind in ("first", "joint")
    if kind == "joint" or make(name)[0].pretraining is not None
]


ALL_KINDS = [param.values for param in KINDS]


@functools.cache
def kind_of(name, kind):
    return Kind(name, kind)


def make_store(name):
    """Blocks of classes that the image shows; the unlabelled ones as the method sees them."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, NUM_CLASSES, (16, SIZE // 4, SIZE // 4)).astype(np.uint8)
    truth = np.repeat(np.repeat(truth, 4, axis=-1), 4, axis=-2)
    image = (truth / 2 + rng.normal(0, 0.2, truth.shape)).astype(np.float32)
    label = truth.copy()
    if make(name)[0].offline:  # pseudo-labels, some of them uncertain
        label[UNLABELED, :3] = IGNORE
        label[UNLABELED[0]] = IGNORE
    else:
        label[UNLABELED] = IGNORE
    return steps.Store(image, label, np.isin(np.arange(16), LABELED))


ADAM = optax.adam(0.02)


@functools.cache
def one_step(name, kind):
    """A step on one device, compiled once for all tests of the module."""
    return jax.jit(kind_of(name, kind).step(ADAM))


def trained(name, kind, store, num_steps, rows=None):
    """State before, state after, and the metrics of each step."""
    made = kind_of(name, kind)
    before = state = made.state(ADAM)
    history = []
    for step in range(num_steps):
        drawn = made.rows(store, step) if rows is None else rows
        state, metrics = one_step(name, kind)(state, store, drawn, KEY)
        history.append(jax.device_get(metrics))
    return before, state, history


def test_every_method_has_a_module_and_a_config():
    modules = {path.stem for path in (ROOT / "lclseg" / "methods").glob("*.py")}
    assert modules - {"__init__", "base", "contract"} == set(METHODS)
    assert {"supervised", "self_training", "local_contrastive"} <= set(METHODS)
    for name in METHODS:
        assert importlib.import_module(f"lclseg.methods.{name}").__doc__


# What sums up or amplifies rounding: never in bfloat16.
SENSITIVE = ("reduce_sum", "exp", "log", "log1p", "rsqrt", "sqrt", "cumsum", "pow")


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_bfloat16_is_of_the_network_alone(name, kind):
    """Losses, BatchNorm's statistics, gradients' sums and what is kept: float32."""
    made, store = kind_of(name, kind), make_store(name)
    step = made.step(ADAM, dtype="bfloat16")
    arguments = made.state(ADAM), store, made.rows(store), KEY
    program, (state, metrics) = jax.make_jaxpr(step, return_shape=True)(*arguments)
    kept = {leaf.dtype for leaf in jax.tree.leaves((state, metrics))}
    assert {d for d in kept if jnp.issubdtype(d, jnp.floating)} == {jnp.dtype("float32")}
    dtypes = collections.defaultdict(set)
    for equation in floor.equations(program.jaxpr):
        found = (v.aval.dtype for v in (*equation.invars, *equation.outvars))
        dtypes[equation.primitive.name] |= {d for d in found if jnp.issubdtype(d, jnp.floating)}
    half = jnp.dtype("bfloat16")
    assert half in dtypes["conv_general_dilated"]
    assert dtypes["reduce_sum"] == {jnp.dtype("float32")}  # so that names are those of JAX
    assert [p for p in SENSITIVE if half in dtypes[p]] == []


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_four_devices_train_like_one(name, kind):
    """In float64, where rounding cannot hide a wrong sum, nor stand for one."""
    made, optimizer = kind_of(name, kind), optax.sgd(0.5)
    store = make_store(name)

    def double(x):
        return np.asarray(x, np.float64 if np.asarray(x).dtype == np.float32 else None)

    def stepped(num_devices):
        step = jax.pmap(
            made.step(optimizer, AXIS, jnp.float64),
            axis_name=AXIS,
            in_axes=(0, None, 0, None),
            devices=jax.local_devices()[:num_devices],
        )
        state = jax.tree.map(double, made.state(optimizer))
        state = jax.tree.map(lambda x: np.broadcast_to(x, (num_devices, *x.shape)), state)
        rows = {g: r.reshape(num_devices, -1) for g, r in made.rows(store).items()}
        doubled = store._replace(image=double(store.image))
        state, metrics = step(state, doubled, rows, KEY)
        for leaf in jax.tree.leaves(state.params):
            np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
        return jax.tree.map(lambda x: np.asarray(x[0]), (state, metrics))

    with jax.enable_x64(True):
        (one, ours), (four, theirs) = stepped(1), stepped(4)
    assert ours["gradient_norm"] > 1e-3 and ours.keys() == theirs.keys()
    assert {leaf.dtype for leaf in jax.tree.leaves(one.params)} == {np.dtype(np.float64)}
    for a, b in zip(
        *(
            jax.tree_util.tree_leaves_with_path((s.params, s.batch_stats, s.memory, m))
            for s, m in ((one, ours), (four, theirs))
        ),
        strict=True,
    ):
        path = jax.tree_util.keystr(a[0])
        np.testing.assert_allclose(a[1], b[1], rtol=1e-9, atol=1e-11, err_msg=path)


def absent(case, name):
    """A store that lacks classes."""
    store = make_store(name)
    image, label = store.image.copy(), store.label.copy()
    match case:
        case "labelled ones show background only":
            label[LABELED] = 0
        case "unlabelled ones have no label":
            label[UNLABELED] = IGNORE
        case "unlabelled ones show background only":
            label[UNLABELED] = np.where(label[UNLABELED] == IGNORE, IGNORE, 0)
        case "one class is nowhere":
            label[label == 1] = 2
        case "black slices, background only":
            image[:] = 0
            label[label != IGNORE] = 0
    return store._replace(image=image, label=label)


@pytest.mark.parametrize(
    "case",
    [
        "labelled ones show background only",
        "unlabelled ones have no label",
        "unlabelled ones show background only",
        "one class is nowhere",
        "black slices, background only",
    ],
)
@pytest.mark.parametrize(("name", "kind"), ALL_KINDS)
def test_value_and_gradient_are_finite_where_classes_are_absent(name, kind, case):
    _, state, history = trained(name, kind, absent(case, name), 2)
    for metrics in history:
        assert all(np.isfinite(value) for value in metrics.values()), metrics
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        (state.params, state.ema_params, state.batch_stats, state.memory)
    ):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)


@functools.cache
def supervised_loss(filters):
    """Of labelled slices, by the first network and the statistics of these slices."""
    net = Net(UNet(NUM_CLASSES, filters))
    base = make("supervised")[1]
    parts = ("unet_trunk", "segmentation_head")

    @jax.jit
    def loss(params, batch_stats, image, label):
        heads = {"labeled": ("segmentation",)}
        out, _ = net(params, batch_stats, {"labeled": image}, heads)
        return jnp.mean(base.segmentation(out["labeled"]["segmentation"], label, None))

    def of(method, state, image, label):
        params, batch_stats = state.params, state.batch_stats
        if method.networks > 1:
            params, batch_stats = jax.tree.map(lambda x: x[0], (params, batch_stats))
        return float(
            loss({k: params[k] for k in parts}, {k: batch_stats[k] for k in parts}, image, label)
        )

    return of


@pytest.mark.parametrize(("name", "kind"), ALL_KINDS)
def test_a_batch_is_learnt(name, kind):
    """By the supervised loss of its labelled slices, whatever the method calls its terms."""
    store = make_store(name)
    rows = kind_of(name, kind).rows(store)
    before, after, history = trained(name, kind, store, 40, rows)
    slices = store.image[rows["labeled"]], store.label[rows["labeled"]]
    method = make(name)[0]
    loss = supervised_loss(filters_of(method))
    first, last = (loss(method, s, *slices) for s in (before, after))
    assert last < 0.6 * first
    assert len(history[0]) > 2 or name == "supervised"  # loss, gradient_norm and its terms


# Whole runs, tiny.

PROGRAMS: dict = {}


@pytest.fixture(autouse=True, scope="module")
def _compiled_once():
    """All runs of a method share their programs: they differ in nothing that is compiled."""
    compile_programs, compiled_predict = setup.compile_programs, devices.compiled_predict

    def shared_programs(config, model, method, num_steps):
        name = (config.method.name, method.sampler is None)
        if name not in PROGRAMS:
            PROGRAMS[name] = compile_programs(config, model, method, num_steps)
        return PROGRAMS[name]

    @functools.cache
    def predict_of(filters, angles):
        return compiled_predict(UNet(4, filters), angles)

    def shared_predict(model, angles=()):
        return predict_of(tuple(model.filters), tuple(angles))

    with (
        mock.patch.object(setup, "compile_programs", shared_programs),
        mock.patch.object(devices, "compiled_predict", shared_predict),
    ):
        yield
    PROGRAMS.clear()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Of four phantom volumes: one labelled, one unlabelled, one to validate, one to test."""
    cases = phantom.find_cases(4)
    with mock.patch.object(phantom, "find_cases", lambda: cases):
        yield tmp_path_factory.mktemp("data")


def run_config(data_dir, name, **values):
    config = small(runpy.run_path(str(CONFIGS / "phantom.py"))["get_config"](name))
    config.model.filters = filters_of(make(name)[0])
    config.data.data_dir = str(data_dir)
    config.data.update(
        image_size=SIZE,
        target_spacing_mm=8.0,
        labeled=("phantom_000",),
        unlabeled=("phantom_001",),
        validation=("phantom_002",),
        test=("phantom_003",),
        eval_batch_size=16,
    )
    config.rounds.update(baseline_steps=4, num_rounds=2, steps_per_round=4, eval_every=2)
    config.rounds.update(batch_norm_batches=1)
    config.log.every = 1
    config.augment.strength = "paper"  # compiled in half the time
    config.update_from_flattened_dict(values)
    return config


def end_of(workdir):
    """Arrays of the newest checkpoint of every stage, as stored, and all logged numbers."""
    found = {}
    for folder in sorted((workdir / "checkpoints").iterdir()):
        with checkpoint.open_stage(folder, read_only=True) as manager:
            item = checkpoint.ocp.args.StandardRestore()
            tree = manager.restore(
                checkpoint.latest_step(manager),
                args=checkpoint.ocp.args.Composite(state=item),
            )
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree["state"]):
            found[folder.name + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return found, logged(workdir)


def assert_same_end(ours, theirs):
    assert ours[0].keys() == theirs[0].keys()
    for name, leaf in ours[0].items():
        np.testing.assert_array_equal(leaf, theirs[0][name], err_msg=name)
    assert ours[1] == theirs[1]


Finished = collections.namedtuple("Finished", "workdir results end traces")


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """name -> an undisturbed run, and how often each kind of step was traced in it."""
    done = {}

    def run(name):
        if name not in done:
            traces = collections.Counter()
            train_step = steps.train_step
            for kind in (True, False):  # so that its programs are traced here
                PROGRAMS.pop((name, kind), None)

            @functools.wraps(train_step)
            def counted(*arguments, **options):
                traces[id(options["terms"])] += 1
                return train_step(*arguments, **options)

            workdir = tmp_path_factory.mktemp("runs") / name
            with mock.patch.object(steps, "train_step", counted):
                results = train.train_and_evaluate(run_config(data_dir, name), workdir)
            done[name] = Finished(workdir, results, end_of(workdir), traces)
        return done[name]

    return run


@pytest.mark.parametrize("name", RUNS)
def test_a_run_traces_each_kind_of_step_once(name, finished):
    """Whatever the number of stages, rounds and new pseudo-labels."""
    run, method = finished(name), make(name)[0]
    stages = (
        {"baseline": 4, "joint": 8}
        if not method.offline
        else dict.fromkeys(("baseline", "round_1", "round_2"), 4)
    )
    if method.sampler is None:
        stages = {"baseline": 12}
    assert {s: r["num_steps"] for s, r in run.results["results"].items()} == stages
    assert list(run.traces.values()) == [1] * min(len(stages), 2)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_is_stopped_goes_on_to_the_same_bits(name, finished, data_dir, tmp_path):
    """In the middle of its last stage, between two validations."""
    undisturbed = finished(name)
    last = list(undisturbed.results["results"])[-1]
    log = tmp_path / "run" / "metrics.jsonl"

    def stop_asked():
        """After the third step of the stage, once the second is written down."""
        if not log.exists():
            return False
        line = json.loads(log.read_text().splitlines()[-1])
        return line["stage"] == last and line["step"] >= 2

    with pytest.raises(Interrupted, match=f"stopped in {last} after step 3 of"):
        train.train_and_evaluate(run_config(data_dir, name), tmp_path / "run", stop_asked)
    train.train_and_evaluate(run_config(data_dir, name), tmp_path / "run")
    assert_same_end(end_of(tmp_path / "run"), undisturbed.end)


@pytest.mark.parametrize("name", RUNS)
def test_the_model_that_is_handed_out_predicts_as_its_test_did(name, finished, data_dir):
    """Trunk and segmentation head of the first network alone."""
    run = finished(name)
    model = model_files.load_run(run.workdir)
    assert model.facts["stage"] == run.results["chosen"] and model.facts["method"] == name
    assert set(model.state.ema_params) == {"unet_trunk", "segmentation_head"}
    prepared, split = setup.open_data(run_config(data_dir, name))
    found = evaluation.evaluate(
        predict.mean_predictor([model]),
        prepared,
        split.test,
        batch_size=16,
        refine=predict.refiner([model]),
        with_distances=False,
    )
    tested = run.results["results"][run.results["chosen"]]["test"]
    assert found["dice_per_class"] == tested["dice_per_class"]


class Poisoned:
    """A source of slices whose records of some volumes have a label that is none."""

    def __init__(self, source, records):
        self.source, self.records, self.num_poisoned = source, set(records), 0

    def __getitems__(self, indices):
        found = []
        for index, record in zip(indices, self.source.__getitems__(indices), strict=True):
            if index in self.records:
                self.num_poisoned += 1
                # The native label stays: the reports tell with it how good pseudo-labels are.
                record = {**record, "label": np.full_like(record["label"], POISON)}
            found.append(record)
        return found


@pytest.mark.parametrize("name", RUNS)
def test_hidden_truth_of_unlabelled_slices_changes_nothing(name, finished, data_dir, tmp_path):
    """It is 254 everywhere, also in the index: the same weights to the bit."""
    undisturbed, opened, sources = finished(name), setup.open_data, []

    def open_data(config):
        prepared, split = opened(config)
        (hidden,) = split.unlabeled
        entry = prepared.volumes[hidden]
        sources.append(Poisoned(prepared.source, entry.slices))
        entry = entry._replace(class_pixels=np.full_like(entry.class_pixels, 77))
        volumes = {**prepared.volumes, hidden: entry}
        return dataclasses.replace(prepared, source=sources[-1], volumes=volumes), split

    with mock.patch.object(setup, "open_data", open_data):
        train.train_and_evaluate(run_config(data_dir, name), tmp_path / "run")
    assert sources[0].num_poisoned > 0 or make(name)[0].sampler is None
    assert_same_end(end_of(tmp_path / "run"), undisturbed.end)


# Pseudo-labels that are made anew within a round.

REFRESH = {"rounds.num_rounds": 1, "rounds.steps_per_round": 7, "rounds.eval_every": 7}


def test_refreshing_once_a_round_is_the_round_itself(finished, data_dir, tmp_path):
    """With n = steps of a round nothing is made anew within it: the next round does."""
    undisturbed = finished("self_training")
    config = run_config(data_dir, "self_training", **{"rounds.refresh_every": 4})
    train.train_and_evaluate(config, tmp_path / "run")
    assert refresh_files(tmp_path / "run") == {}
    assert_same_end(end_of(tmp_path / "run"), undisturbed.end)


@pytest.fixture(scope="module")
def refreshed(data_dir, tmp_path_factory):
    """Folder of a run whose only round makes its labels anew after its steps 2, 4 and 6."""
    workdir = tmp_path_factory.mktemp("refreshed") / "run"
    config = run_config(data_dir, "self_training", **REFRESH, **{"rounds.refresh_every": 2})
    train.train_and_evaluate(config, workdir)
    return workdir


def refresh_files(workdir):
    folder = workdir / "pseudo_labels" / "round_1"
    return {p.name: np.load(p)["labels"] for p in sorted(folder.glob("refreshed_*.npz"))}


def test_refreshed_labels_are_learnt_from(refreshed, data_dir, tmp_path):
    """They differ from those of the round, and so do the weights that learn from them."""
    files = refresh_files(refreshed)
    assert list(files)[-1] == "refreshed_0000006.npz"
    first = np.load(refreshed / "pseudo_labels" / "round_1" / "labels.npy")
    newest = files["refreshed_0000006.npz"]
    assert newest.shape == first.shape and newest.dtype == first.dtype
    assert np.any(newest != first)
    train.train_and_evaluate(run_config(data_dir, "self_training", **REFRESH), tmp_path / "run")
    (ours, our_log), (theirs, their_log) = end_of(tmp_path / "run"), end_of(refreshed)
    assert any(np.any(leaf != theirs[name]) for name, leaf in ours.items() if "params" in name)
    # Up to the refresh the two are one: lines of the round's steps 1 and 2.
    lines = [[x for x in log if x["stage"] == "round_1"] for log in (our_log, their_log)]
    same = [a == b for a, b in zip(*lines, strict=True)]
    assert same[:2] == [True, True] and not any(same[2:])


def test_a_stop_between_two_refreshes_changes_nothing(refreshed, data_dir, tmp_path):
    config = run_config(data_dir, "self_training", **REFRESH, **{"rounds.refresh_every": 2})
    log = tmp_path / "run" / "metrics.jsonl"
    for step in (2, 5):

        def stop_asked(step=step):
            if not log.exists():
                return False
            line = json.loads(log.read_text().splitlines()[-1])
            return line["stage"] == "round_1" and line["step"] == step

        with pytest.raises(Interrupted, match=f"after step {step + 1} of 7"):
            train.train_and_evaluate(config, tmp_path / "run", stop_asked)
    train.train_and_evaluate(config, tmp_path / "run")
    assert_same_end(end_of(tmp_path / "run"), end_of(refreshed))
    ours, theirs = refresh_files(tmp_path / "run"), refresh_files(refreshed)
    np.testing.assert_array_equal(*(f["refreshed_0000006.npz"] for f in (ours, theirs)))


def test_a_stage_that_becomes_longer_is_the_longer_stage(refreshed, data_dir, tmp_path):
    """It was to end after step 4, where the longer one makes its labels anew."""
    config = run_config(data_dir, "self_training", **REFRESH, **{"rounds.refresh_every": 2})
    for num_steps in (4, 7):
        config.rounds.steps_per_round = num_steps
        train.train_and_evaluate(config, tmp_path / "run")
    (ours, log), (theirs, whole) = end_of(tmp_path / "run"), end_of(refreshed)
    # The shorter one's end is validated.
    end = {"stage": "round_1", "step": 4}.items()
    log = [x for x in log if not (end <= x.items() and "validation_dice" in x)]
    assert_same_end((ours, log), (theirs, whole))
