"""What a state of a run predicts, on all devices and in all processes."""

from collections.abc import Callable

import jax
from ml_collections import ConfigDict

from lclseg import evaluation, steps
from lclseg.run import devices, multihost
from lclseg.run.programs import copy_angles
from lclseg.run.setup import Run


def predictor(
    run: Run,
    replicated: steps.TrainState,
    *,
    test_time_augmentation: bool = False,
    finish: Callable | None = None,
    stoppable: bool = True,
) -> evaluation.Predict:
    """Makes a state's `batched_predictor`; of several processes, each predicts its part.

    With `test_time_augmentation` the mean over turned copies, see `test_time`. It stops when asked
    to, if `stoppable`: not in validation, which belongs to the step before it.
    """
    compiled, copies = run.predict, 1
    if test_time_augmentation:
        compiled, copies = run.predict_mean, 1 + len(copy_angles(run.config))
    if run.method.networks > 1:
        replicated = jax.vmap(steps.first_network)(replicated)
    predict = devices.batched_predictor(
        compiled,
        replicated,
        batch_size=-(-run.config.data.eval_batch_size // (jax.process_count() * copies)),
        finish=finish,
        stop_asked=run.stop_asked if stoppable else lambda: False,
    )
    return multihost.predict_together(predict)


def refinement(
    config: ConfigDict, options: ConfigDict, *, upsampling: int = 1
) -> evaluation.Refine | None:
    """Makes what refines pseudo-labels, or predictions, of these `options`; see `evaluation`.

    The CRF runs on all devices and in all processes, on a grid `upsampling` times as fine. That is
    for predictions alone: pseudo-labels are learnt on the training grid.
    """
    crf = None
    if options.crf and config.crf.num_steps:
        crf = multihost.predict_together(devices.batched_crf(**config.crf, upsampling=upsampling))
    return evaluation.refiner(options.through_plane_sigma, crf)


def evaluate_state(
    run: Run, replicated: steps.TrainState, volume_ids, *, stoppable: bool, **kwargs
) -> dict:
    """Computes metrics of a state, a copy per device, on volumes; see `evaluation.evaluate`.

    Probabilities come to the host, not labels: they are resampled to each volume's own geometry.
    They are what the run hands out: means over copies, smoothed across slices, refined by the CRF,
    each as the config has it.
    """
    options = run.config.predictions
    return evaluation.evaluate(
        predictor(
            run,
            replicated,
            test_time_augmentation=options.test_time_augmentation,
            stoppable=stoppable,
        ),
        run.prepared,
        volume_ids,
        batch_size=run.config.data.eval_batch_size,
        refine=refinement(run.config, options, upsampling=options.crf_upsampling),
        **kwargs,
    )
