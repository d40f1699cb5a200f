"""`lclseg.check_data` on folders with every kind of fault, and the reader on mutated files."""

import gzip
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import hypothesis
import nibabel as nib
import numpy as np
import pytest
from hypothesis import strategies as st
from ml_collections import ConfigDict

from lclseg import check_data
from lclseg.data import nifti, own_data
from lclseg.data.layouts import find_files

AFFINE = np.diag([1.0, 1.0, 4.0, 1.0])


def image(seed=0, shape=(6, 7, 4)):
    return np.random.default_rng(seed).integers(0, 1000, shape).astype(np.int16)


def label(values=(0, 1, 2)):
    out = np.zeros((6, 7, 4), np.uint8)
    out[1:3, 2:4, 1:] = values[1]
    out[4, 2:4, 1:] = values[2]
    return out


def write(path, data, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Two labelled cases and one without a label, all well."""
    for n in range(3):
        write(tmp_path / "images" / f"case{n}.nii.gz", image(n))
    for n in range(2):
        write(tmp_path / "labels" / f"case{n}.nii.gz", label())
    (tmp_path / "images" / "._case0.nii.gz").write_bytes(b"\x00\x05\x16\x07")
    return tmp_path


def test_a_folder_without_problems(folder):
    assert check_data.check_folder(folder).problems == ()
    found = find_files(folder)
    assert [(f.case_id, f.label is not None) for f in found] == [
        ("case0", True),
        ("case1", True),
        ("case2", False),
    ]


def set_header(path, **fields):
    """Writes header fields past nibabel's checks."""
    raw = bytearray(gzip.decompress(path.read_bytes()))
    header = np.frombuffer(raw, nib.nifti1.header_dtype, count=1)[0]
    for name, value in fields.items():
        header[name] = value
    path.write_bytes(gzip.compress(bytes(raw)))


def nan_image(path):
    data = image().astype(np.float32)
    data[0, 0, 0] = np.nan
    write(path, data)


FAULTS = {
    "truncated": (
        "images",
        lambda p: p.write_bytes(p.read_bytes()[:150]),
        "case1.nii.gz: not readable as NIfTI.*copy or download it again",
    ),
    "empty file": ("images", lambda p: p.write_bytes(b""), "case1.nii.gz: not readable as NIfTI"),
    "no NIfTI": ("images", lambda p: p.write_text("hello"), "case1.nii.gz: not readable as NIfTI"),
    "absurd size": (
        "images",
        lambda p: set_header(p, dim=(3, 30000, 30000, 30000, 1, 1, 1, 1)),
        r"shape \(30000, 30000, 30000\); wanted at most",
    ),
    "one long axis": (
        "images",
        lambda p: set_header(p, dim=(4, 32767, 32767, 1, 1, 1, 1, 1)),
        r"shape \(32767, 32767, 1, 1\); wanted at most",
    ),
    "far offset": ("images", lambda p: set_header(p, vox_offset=2e9), "start at byte 2000000000"),
    "NaN": ("images", nan_image, "1 voxels are NaN or infinite; wanted finite"),
    "constant": (
        "images",
        lambda p: write(p, np.full((6, 7, 4), 3, np.int16)),
        "every voxel is 3; wanted an image",
    ),
    "2-D": ("images", lambda p: write(p, image()[..., 0]), r"shape \(6, 7\); wanted a 3-D volume"),
    "4-D": (
        "images",
        lambda p: write(p, image(shape=(6, 7, 4, 2))),
        r"shape \(6, 7, 4, 2\); wanted a 3-D volume",
    ),
    "5-D": (
        "images",
        lambda p: write(p, image(shape=(6, 7, 4, 1, 2))),
        r"shape \(6, 7, 4, 1, 2\); wanted a 3-D volume",
    ),
    "complex": (
        "images",
        lambda p: write(p, image().astype(np.complex64)),
        "voxels of type complex64; wanted real numbers",
    ),
    "zero spacing": (
        "images",
        lambda p: set_header(p, pixdim=(1, 1, 0, 4, 0, 0, 0, 0)),
        r"voxel spacing is \(1.0, 0.0, 4.0\) mm; wanted positive numbers",
    ),
    "negative spacing": (
        "images",
        lambda p: set_header(p, pixdim=(1, 1, -1, 4, 0, 0, 0, 0)),
        r"voxel spacing is \(1.0, -1.0, 4.0\) mm; wanted positive numbers",
    ),
    "other shape": (
        "labels",
        lambda p: write(p, label()[:, :, :3]),
        r"label has shape \(6, 7, 3\)",
    ),
    "other affine": ("labels", lambda p: write(p, label(), AFFINE * 2), "lie differently in space"),
    "negative label": (
        "labels",
        lambda p: write(p, -label().astype(np.int16)),
        r"label values -2, -1; wanted whole numbers 0\.\.65535",
    ),
    "fractional label": (
        "labels",
        lambda p: write(p, label() * np.float32(0.5)),
        r"label values 0\.5; wanted whole numbers 0\.\.65535: are these prob",
    ),
    "unknown label": (
        "labels",
        lambda p: write(p, label((0, 1, 7))),
        r"label values 7; wanted whole numbers 0\.\.2",
    ),
    "no foreground": (
        "labels",
        lambda p: [write(q, np.zeros((6, 7, 4), np.uint8)) for q in p.parent.iterdir()],
        r"\(case0, case1\), all of them empty; set data\.labeled and data\.validation",
    ),
}


@pytest.mark.parametrize(("part", "spoil", "message"), FAULTS.values(), ids=FAULTS)
def test_each_fault_is_one_line(folder, part, spoil, message):
    path = folder / part / "case1.nii.gz"
    spoil(path)
    (problem,) = check_data.check_folder(folder, 3).problems
    assert problem.startswith(str(path)) or "case1" in problem
    assert re.search(message, problem), problem


def test_empty_test_masks_alone(folder):
    """What a run finds once it has prepared them is told here at once."""
    for n in (2, 3, 4):
        write(folder / "images" / f"case{n}.nii.gz", image())
        write(folder / "labels" / f"case{n}.nii.gz", label())
    write(folder / "images" / "case5.nii.gz", image())
    config = ConfigDict({"data": {**own_data.OPEN, "manual_dir": str(folder)}})
    tested = own_data.complete(config)[0].data.test
    assert check_data.check_folder(folder).problems == ()
    for case in tested:
        write(folder / "labels" / f"{case}.nii.gz", np.zeros((6, 7, 4), np.uint8))
    (problem,) = check_data.check_folder(folder).problems
    assert f"the masks of data.test ({', '.join(tested)}) show no class at all" in problem


def test_values_of_masks_that_no_run_looks_at(folder):
    """Of five masks two learn and one validates; a class that only the others show is told."""
    for n in range(2, 5):
        write(folder / "images" / f"case{n}.nii.gz", image(n))
        write(folder / "labels" / f"case{n}.nii.gz", label())
    proposal = check_data.check_folder(folder).proposal
    assert "WARNING: value" not in proposal
    unseen = next(f"case{n}" for n in range(5) if f"case{n}" not in drawn_in(proposal))
    write(folder / "labels" / f"{unseen}.nii.gz", label((0, 1, 9)))
    again = check_data.check_folder(folder).proposal
    assert f"WARNING: value 9: in the masks of {unseen} alone (1 in all)" in again
    assert own_data.warnings_in(again)[-1].startswith("value 9")


def drawn_in(proposal):
    lines = [x for x in proposal.splitlines() if x.startswith(("  data.labeled", "  data.valid"))]
    return " ".join(lines)


def test_all_problems_at_once_and_exit_code(folder):
    """Two in one image, one in a label, and an id twice; by the command."""
    path = folder / "images" / "case2.nii.gz"
    nan_image(path)
    set_header(path, pixdim=(1, 0, 1, 1, 0, 0, 0, 0))
    write(folder / "labels" / "case0.nii.gz", label((0, 1, 9)))
    write(folder / "images" / "case1.nii", image())
    command = [sys.executable, "-m", "lclseg.check_data", f"--input={folder}", "--num_classes=3"]
    ended = subprocess.run(command, capture_output=True, text=True)
    lines = ended.stdout.splitlines()
    assert ended.returncode == 1 and len(lines) == 4
    assert "several images are called case1" in lines[0] and "label values 9" in lines[1]
    assert "NaN" in lines[2] and "spacing" in lines[3]


def test_command_on_a_good_folder(folder):
    command = [sys.executable, "-m", "lclseg.check_data", f"--input={folder}"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0
    assert ended.stdout.endswith("3 cases, 2 of them with a label: no problem found\n")
    assert "data.image_size = 32" in ended.stdout


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_nothing_there(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (problem,) = check_data.check_folder(tmp_path / name).problems
    assert "no folder" in problem or "no image in" in problem


def test_decathlon_and_acdc_layouts(tmp_path):
    msd, acdc = tmp_path / "msd", tmp_path / "acdc"
    for name in ("imagesTr/a_0000", "imagesTr/b_0000", "labelsTr/a", "imagesTs/c_0000"):
        write(msd / f"{name}.nii.gz", label())
    found = [(f.case_id, f.label and f.label.parent.name) for f in find_files(msd)]
    assert found == [("a", "labelsTr"), ("b", None), ("c", None)]
    for name in ("patient001/p1_frame01", "patient001/p1_frame01_gt", "patient002/p2_frame04"):
        write(acdc / f"{name}.nii.gz", label())
    found = [(f.case_id, f.label and f.label.name) for f in find_files(acdc)]
    assert found == [("p1_frame01", "p1_frame01_gt.nii.gz"), ("p2_frame04", None)]


# --- mutated files ------------------------------------------------------------------------------

GOOD = {}
with tempfile.TemporaryDirectory() as place:
    for suffix in (".nii", ".nii.gz"):
        GOOD[suffix] = write(Path(place) / f"good{suffix}", image()).read_bytes()


@st.composite
def mutated(draw):
    """A NIfTI file with bytes changed, mostly in the header, cut off or too long."""
    compress = draw(st.booleans())
    content = bytearray(GOOD[".nii"])
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(0, 351) | st.integers(0, len(content) - 1))
        content[place] = draw(st.integers(0, 255))
    content = bytes(content[: draw(st.just(None) | st.integers(0, len(content)))])
    content += draw(st.binary(max_size=20))
    if not compress:
        return ".nii", content
    packed = bytearray(gzip.compress(content))
    for _ in range(draw(st.integers(0, 2))):
        packed[draw(st.integers(0, len(packed) - 1))] = draw(st.integers(0, 255))
    return ".nii.gz", bytes(packed)


@hypothesis.settings(max_examples=300, deadline=2000, derandomize=True)
@hypothesis.given(mutated())
def test_reader_reads_or_raises_its_own_error(file):
    suffix, content = file
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"mutated{suffix}"
        path.write_bytes(content)
        try:
            volume = nifti.read_image(path)
        except nifti.VolumeError as error:
            assert str(path) in str(error)
        else:
            assert volume.image.ndim == 3 and np.isfinite(volume.image).all()
            assert min(volume.spacing_mm) > 0


def test_a_gzip_bomb_is_refused_before_memory_is_touched(tmp_path):
    """A header that asks for 8 GB, and a stream that would fill it: under a memory limit."""
    path = tmp_path / "bomb.nii.gz"
    header = nib.Nifti1Image(image(), AFFINE).header
    header["dim"] = (3, 2048, 2048, 1024, 1, 1, 1, 1)
    with gzip.open(path, "wb") as stream:
        stream.write(header.binaryblock + b"\0" * 4 + bytes(2**24))
    program = (
        "import resource, sys\n"
        "from lclseg.data import nifti\n"
        "used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n"
        f"    nifti.read_image(__import__('pathlib').Path({str(path)!r}))\n"
        "except nifti.VolumeError as error:\n"
        "    print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    message, kilobytes = ended.stdout.splitlines()
    assert "wanted at most" in message
    assert int(kilobytes) < 20_000
