"""The joint step on paper: operations, bytes, and the time they take at least on an accelerator.

Counted in the program that JAX traces, 20 labelled slices + 10 pairs: every convolution, matrix
product, reduction and gather reads its operands and writes its result once; what is elementwise is
fused into these and free. An operation takes as long as its arithmetic at the chip's peak or its
bytes at the memory's, whichever is longer; the floor is the sum.

  python -m benchmarks.floor [--sizes 192 96 64] [--json FILE]
"""

import functools
import math
import runpy
import sys
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks import harness


class Chip(NamedTuple):
    """Public peak figures of one chip, and what its all-reduce is assumed to take.

    Attributes:
      flops: multiplications and additions per second, dense, bfloat16.
      bytes: of memory, per second.
      link: bytes per second to its neighbours.
      latency: seconds of a small all-reduce, assumed.
    """

    flops: float
    bytes: float
    link: float
    latency: float


CHIPS = {
    "H100 SXM": Chip(flops=989e12, bytes=3.35e12, link=450e9, latency=10e-6),
    "TPU v4": Chip(flops=275e12, bytes=1.2e12, link=270e9, latency=10e-6),
}
DEVICES = (8, 64, 512)
COUNTED = ("reduce_sum", "reduce_max", "gather", "scatter-add", "scatter_add", "argmax")


class Operation(NamedTuple):
    """One counted operation: floating-point operations, bytes read and written."""

    flops: float
    bytes: float


def joint_step(size: int, axis: tuple[tuple[str, int], ...] = ()):
    """The traced program of a joint step of the paper's batch, bfloat16 compute."""
    import jax
    import jax.numpy as jnp
    import optax

    from lclseg import steps
    from lclseg.models import UNet

    config = runpy.run_path(str(harness.ROOT / "configs" / "default.py"))["get_config"]()
    axis_name = axis[0][0] if axis else None
    model = UNet(
        num_classes=4,
        filters=tuple(config.model.filters),
        embedding_dim=config.model.embedding_dim,
        dtype="bfloat16",
        axis_name=axis_name,
    )
    optimizer = optax.adam(config.optimizer.learning_rate)
    key = jax.random.key(0)
    create = functools.partial(
        steps.create_train_state, model=model.clone(axis_name=None), optimizer=optimizer
    )
    state = create(key, image_size=size)
    num_labeled, num_pairs = config.data.labeled_batch_size, sum(config.data.pairs.values())

    def array(shape, dtype):
        return jax.ShapeDtypeStruct((*shape, size, size), dtype)

    batch = {
        "image": array((num_labeled,), jnp.float32),
        "label": array((num_labeled,), jnp.int32),
        "pair_image": array((num_pairs, 2), jnp.float32),
        "pair_label": array((num_pairs, 2), jnp.int32),
    }
    step = functools.partial(
        steps.train_step,
        model=model,
        optimizer=optimizer,
        loss_options=steps.LossOptions(**config.loss),
        augment_options=steps.AugmentOptions(**config.augment),
        ema_decay=config.optimizer.ema_decay,
        axis_name=axis_name,
    )
    return jax.make_jaxpr(step, axis_env=list(axis))(state, batch, key)


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
    return Operation(flops, sum(map(size_in_bytes, (*equation.invars, *equation.outvars))))


def floor(operations: list[Operation], chip: Chip) -> float:
    """Seconds that the operations take at least, one after the other."""
    return sum(max(o.flops / chip.flops, o.bytes / chip.bytes) for o in operations)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[192, 96, 64], help="px")
    args = parser.parse_args()
    rows = []
    for size in args.sizes:
        found = [o for e in equations(joint_step(size).jaxpr) if (o := operation(e))]
        flops, moved = sum(o.flops for o in found), sum(o.bytes for o in found)
        sums = [
            v
            for e in equations(joint_step(size, (("devices", 8),)).jaxpr)
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
