"""Your own NIfTI volumes: some with a mask, the others are the unlabelled pool.

  python -m lclseg.main --config=configs/nifti_folder.py --config.data.manual_dir=MYDATA \
    --workdir=runs/mine

Expected: some minutes on two CPU cores; the score depends on the data, see report.html.

MYDATA holds images/ and labels/ with equal names, or imagesTr/, labelsTr/, imagesTs/, labelsTs/
and dataset.json (nnU-Net, Medical Segmentation Decathlon), as NIfTI, MetaImage or NRRD files. What
is left open here (0, -1, ()) is proposed from the data and printed before the run. The schedule,
400 + 600 steps of self-training, is for two CPU cores; with a GPU, raise rounds.baseline_steps,
rounds.steps_per_round and rounds.refresh_every (acdc_256.py: 6000, 24000 and 2000).
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

HERE = Path(__file__).parent
get_default = runpy.run_path(str(HERE / "default.py"))["get_config"]
short = runpy.run_path(str(HERE / "parts" / "short.py"))


def get_config(method: str = "self_training") -> ConfigDict:
    config = get_default(method)
    data = config.data
    data.name = "nifti_folder"
    data.image_size = 0  # px, a multiple of 32; 0: what covers the masks' foreground
    data.target_spacing_mm = 0.0  # in-plane; 0: median
    # Slices lie along: 0 left to right, 1 back to front, 2 up; -1: the one of coarsest spacing.
    data.slice_axis = -1
    data.label_values = ()  # in the masks, of the classes 1, 2, ...; (): all but 0
    data.class_names = ()  # (): from dataset.json, or class_<value>
    data.ignore_value = -1  # in the masks, where nothing is known; -1: "ignore" of dataset.json
    data.exclude = ()  # cases to leave out
    data.patients_by_name = True  # patient1_frame01, patient1_frame12: one patient, one role
    data.channels = ()  # of NAME_0000, NAME_0001, ...; (): all
    data.windows = ()  # (low, high) or None by channel; (): of CT, what the foreground has
    data.folder_digest = ""  # filled in: names, sizes and times of the files
    data.with_mask = ()  # filled in: cases that have one, so that a later run knows the new ones
    # Cases with a mask to learn from; "all": but for validation and test. The lists of cases are
    # drawn by draw_seed, not by seed, so that runs of several seeds share their test volumes.
    data.num_labeled = "2"
    data.draw_seed = 0
    data.split = "drawn"
    short["shorten"](config)
    return config
