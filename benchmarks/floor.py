"""The joint step on paper: operations, bytes, and the time they take at least on an accelerator.

Counted in the program that JAX traces, 20 labelled slices + 10 pairs: every convolution, matrix
product and reduction reads its operands and writes its result once, a gather reads no more than it
gives; what is elementwise is fused into these and free. An operation takes as long as its
arithmetic at the chip's peak or its bytes at the memory's, whichever is longer; the floor is the
sum.

  python -m benchmarks.floor [--sizes 192 96 64] [--json FILE]
"""

import functools
import math
import runpy
import sys
from collections.abc import Iterator
from typing import NamedTuple

from ml_collections import ConfigDict

from benchmarks import harness


class Chip(NamedTuple):
    """Public peak figures of one chip, and what its all-reduce is assumed to take.

    Attributes:
      flops: multiplications and additions per second, dense, bfloat16.
      flops_float32: of float32 convolutions and products as JAX does them by default: TF32 on an
        NVIDIA GPU, bfloat16 on a TPU.
      bytes: of memory, per second.
      link: bytes per second to its neighbours.
      latency: seconds of a small all-reduce, assumed.
    """

    flops: float
    flops_float32: float
    bytes: float
    link: float
    latency: float


H100 = Chip(flops=989e12, flops_float32=494e12, bytes=3.35e12, link=450e9, latency=10e-6)
TPU_V4 = Chip(flops=275e12, flops_float32=275e12, bytes=1.2e12, link=270e9, latency=10e-6)
CHIPS = {"H100 SXM": H100, "TPU v4": TPU_V4}
# By `device_kind`, as far as the name tells the chip.
KINDS = {
    "NVIDIA H100 80GB HBM3": H100,
    "NVIDIA H200": H100._replace(bytes=4.8e12),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 156e12, 2.039e12, 300e9, 10e-6),
    "TPU v4": TPU_V4,
}
NUM_STORED = 1000  # slices on the device; the count does not depend on them
NUM_CLASSES = 4
DEVICES = (8, 64, 512)
COUNTED = ("reduce_sum", "reduce_max", "gather", "scatter-add", "scatter_add", "argmax")


class Operation(NamedTuple):
    """One counted operation: floating-point operations, bytes read and written."""

    flops: float
    bytes: float


def paper_config() -> ConfigDict:
    """configs/default.py: the paper's model, method and batch."""
    return runpy.run_path(str(harness.ROOT / "configs" / "default.py"))["get_config"]()


def parts_of_step(config: ConfigDict, axis_name: str | None = None):
    """The joint step of a config with 4 classes, and a function key -> its first state."""
    import optax

    from lclseg import steps
    from lclseg.methods.base import method_of
    from lclseg.models import Net, UNet

    method = method_of(config, NUM_CLASSES)
    model = UNet(
        num_classes=NUM_CLASSES,
        filters=tuple(config.model.filters),
        heads=method.heads,
        dtype=config.model.dtype,
        axis_name=axis_name,
    )
    optimizer = optax.adam(config.optimizer.learning_rate)
    create = functools.partial(
        steps.create_train_state,
        model=model.clone(axis_name=None),
        optimizer=optimizer,
        image_size=config.data.image_size,
    )
    step = functools.partial(
        steps.train_step,
        net=Net(model),
        terms=method.terms,
        views=method.views,
        optimizer=optimizer,
        ema_decay=config.optimizer.ema_decay,
    )
    return step, create


def joint_step(config: ConfigDict, axis: tuple[tuple[str, int], ...] = ()):
    """The traced program of a joint step of a config."""
    import jax
    import jax.numpy as jnp

    from lclseg.steps import Store

    step, create = parts_of_step(config, axis[0][0] if axis else None)
    key, size = jax.random.key(0), config.data.image_size
    array = jax.ShapeDtypeStruct
    store = Store(
        image=array((NUM_STORED, size, size), jnp.float32),
        label=array((NUM_STORED, size, size), jnp.uint8),
        is_labeled=array((NUM_STORED,), jnp.bool_),
    )
    rows = {
        "labeled": array((config.data.labeled_batch_size,), jnp.int32),
        "pairs": array((2 * sum(config.method.pairs.values()),), jnp.int32),
    }
    return jax.make_jaxpr(step, axis_env=list(axis))(create(key), store, rows, key)


def operations(config: ConfigDict) -> list[Operation]:
    """What a joint step of a config does."""
    return [o for e in equations(joint_step(config).jaxpr) if (o := operation(e))]


def equations(jaxpr) -> Iterator:
    """The equations of a program and of the programs that it calls; loops count once.

    Of a choice by platform, the last branch: what is not for CPUs.
    """
    for equation in jaxpr.eqns:
        inner = [
            getattr(p, "jaxpr", p)
            for value in equation.params.values()
            for p in (value if isinstance(value, (tuple, list)) else (value,))
            if hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ]
        if inner:
            for program in inner[-1:] if equation.primitive.name == "cond" else inner:
                yield from equations(program)
        else:
            yield equation


def size_in_bytes(variable) -> int:
    return math.prod(variable.aval.shape) * variable.aval.dtype.itemsize


def operation(equation) -> Operation | None:
    """What an equation costs; None: it is elementwise, and free."""
    name = equation.primitive.name
    result = equation.outvars[0].aval
    if name == "conv_general_dilated":
        kernel, numbers = equation.invars[1].aval, equation.params["dimension_numbers"]
        per_output = math.prod(kernel.shape) // kernel.shape[numbers.rhs_spec[0]]
        # Zeros that a dilated operand holds are not multiplied.
        dilation = math.prod(equation.params["lhs_dilation"])
        flops = 2 * math.prod(result.shape) * per_output / dilation
    elif name == "dot_general":
        ((contracted, _), _) = equation.params["dimension_numbers"]
        left = equation.invars[0].aval
        flops = 2 * math.prod(result.shape) * math.prod(left.shape[i] for i in contracted)
    elif name in COUNTED:
        flops = 0.0
    else:
        return None
    read = list(map(size_in_bytes, equation.invars))
    written = size_in_bytes(equation.outvars[0])
    if name == "gather":
        read[0] = min(read[0], written)  # of a large operand, such as all slices, what is taken
    return Operation(flops, sum(read) + written)


def floor(operations: list[Operation], chip: Chip, dtype: str = "bfloat16") -> float:
    """Seconds that the operations take at least, one after the other."""
    flops = chip.flops if dtype == "bfloat16" else chip.flops_float32
    return sum(max(o.flops / flops, o.bytes / chip.bytes) for o in operations)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[192, 96, 64], help="px")
    args = parser.parse_args()
    rows = []
    config = paper_config()
    config.model.dtype = "bfloat16"
    for size in args.sizes:
        config.data.image_size = size
        found = operations(config)
        flops, moved = sum(o.flops for o in found), sum(o.bytes for o in found)
        sums = [
            v
            for e in equations(joint_step(config, (("devices", 8),)).jaxpr)
            if e.primitive.name.startswith("psum")
            for v in e.invars
        ]
        # Mean and mean square of each BatchNorm, forward and backward, wait for one another; the
        # gradients of all parameters go together.
        waits = 1 + sum(v.aval.ndim == 2 and v.aval.shape[0] == 2 for v in sums)
        summed = sum(map(size_in_bytes, sums))
        for name, chip in CHIPS.items():
            alone = floor(found, chip)
            talk = waits * chip.latency + 2 * summed / chip.link
            rows.append(
                {
                    "px": size,
                    "chip": name,
                    "Gflop": flops / 1e9,
                    "GB": moved / 1e9,
                    "arithmetic alone, ms": 1e3 * flops / chip.flops,
                    "memory alone, ms": 1e3 * moved / chip.bytes,
                    "floor, ms": 1e3 * alone,
                    "slices/s": 40 / alone,
                    "all-reduces": waits,
                    "their MB": summed / 1e6,
                    "their time, ms": 1e3 * talk,
                    # The same batch for all: 10 pairs, so 10 devices at most.
                    "10 devices, same batch": alone / (alone / 10 + talk),
                    **{f"{n}, batch x {n}": n * alone / (alone + talk) for n in DEVICES},
                }
            )
    harness.report("Joint step on paper, 20 slices + 10 pairs, bfloat16", rows, args.json)


if __name__ == "__main__":
    sys.exit(main())
