"""The stages of a run, and the programs that each kind of stage runs on the devices."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import optax
from ml_collections import ConfigDict

from lclseg import steps, test_time
from lclseg.methods import supervised
from lclseg.methods.contract import Base, Method
from lclseg.models import Net, UNet
from lclseg.run import devices


class Stage(NamedTuple):
    """A stretch of training with one loss, which ends in a test.

    Attributes:
      name: "baseline", "round_<k>", or "joint" where a method stores no pseudo-labels.
      kind: "first" or "joint".
      first_step: counted over the run.
      num_steps: of the stage.
    """

    name: str
    kind: str
    first_step: int
    num_steps: int


class Programs(NamedTuple):
    """What one kind of stage runs on the devices.

    Attributes:
      method: what the stage trains.
      optimizer: of the stage.
      train: compiled over devices: `steps.train_step`, or `steps.train_steps` where one dispatch
        takes several.
      statistics: compiled `steps.batch_statistics`.
    """

    method: Method
    optimizer: optax.GradientTransformation
    train: Callable
    statistics: Callable


def copy_angles(config: ConfigDict) -> tuple[float, ...]:
    """Chooses angles, radians, of the copies that test-time augmentation predicts."""
    augment = config.augment
    strong = augment.strength == "strong"
    return test_time.copy_angles(
        augment.strong_rotation_degrees if strong else augment.max_rotation_degrees
    )


def stages(config: ConfigDict, method: Method) -> list[Stage]:
    """Lists the stages of a run: the first one, then rounds, or all their steps as one stage.

    A method without a sampler learns from labelled slices alone: all steps are its first stage.
    """
    first, number, each = (
        config.rounds.baseline_steps,
        config.rounds.num_rounds,
        config.rounds.steps_per_round,
    )
    if method.sampler is None:
        return [Stage("baseline", "first", 0, first + number * each)]
    found = [Stage("baseline", "first", 0, first)]
    if method.offline:
        for k in range(number):
            found.append(Stage(f"round_{k + 1}", "joint", first + k * each, each))
    elif number:
        found.append(Stage("joint", "joint", first, number * each))
    return found


def first_method(method: Method, base: Base) -> Method:
    """Chooses what the first stage trains: the method's own pretraining, else supervised training.

    Supervised training has no heads and no memory of the method, so that the first stages of most
    methods are one and the same.
    """
    if method.pretraining is None:
        return supervised.make(None, base)
    terms, views = method.pretraining
    return method._replace(terms=terms, views=views, sampler=None)


def compile_programs(config: ConfigDict, model: UNet, method: Method, num_steps: int) -> Programs:
    """Makes the programs of one kind of stage; XLA compiles each when it is first called."""
    optimizer = make_optimizer(config.optimizer, num_steps)
    net = Net(model)
    step = functools.partial(
        steps.train_step,
        net=net,
        terms=method.terms,
        views=method.views,
        optimizer=optimizer,
        ema_decay=config.optimizer.ema_decay,
        remember=method.remember,
    )
    if devices.steps_per_dispatch(config.log.every) > 1:
        step = functools.partial(steps.train_steps, step=step)
    statistics = functools.partial(
        steps.batch_statistics, net=net, terms=method.terms, views=method.views
    )
    return Programs(
        method=method,
        optimizer=optimizer,
        train=devices.over_devices(step, donate_state=True),
        statistics=devices.over_devices(statistics, donate_state=False),
    )


def make_optimizer(config: ConfigDict, num_steps: int) -> optax.GradientTransformation:
    """Makes Adam, with the config's learning rate, constant or decaying to 0 over the stage."""
    rate = config.learning_rate
    if config.schedule == "cosine":
        rate = optax.cosine_decay_schedule(rate, num_steps)
    return optax.adam(rate)
