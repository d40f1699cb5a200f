"""Builders of the prostate and whole-heart sets, on small files in the published layout."""

import hashlib
import http.server
import io
import json
import logging
import tarfile
import threading

import nibabel as nib
import numpy as np
import pytest

from lclseg.data import nifti, orientation
from lclseg.data.dataset import open_prepared
from tfds_builders.mmwhs import mmwhs_dataset_builder as mmwhs
from tfds_builders.prostate import archive
from tfds_builders.prostate import prostate_dataset_builder as prostate

PIXDIM = (0.6, 0.8, 3.6)


def oblique(spacing_mm):
    """Affine of an acquisition tilted about all axes, as the cardiac files have it."""
    x, y, z = np.radians((20, -35, 50))
    rotate_x = [[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]]
    rotate_y = [[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]]
    rotate_z = [[np.cos(z), -np.sin(z), 0], [np.sin(z), np.cos(z), 0], [0, 0, 1]]
    affine = np.eye(4)
    affine[:3, :3] = np.array(rotate_z) @ rotate_y @ rotate_x @ np.diag(spacing_mm)
    affine[:3, 3] = (-31.5, 12.25, 77.0)
    return affine


def write(path, data, *, spacing_mm=PIXDIM, sform=None):
    """Writes a file whose pixdim and qform tell `spacing_mm`, whatever the sform says."""
    qform = oblique(spacing_mm)
    header = nib.Nifti1Header()
    header.set_data_dtype(data.dtype)
    header.set_data_shape(data.shape)
    header.set_zooms((*spacing_mm, 1.0)[: data.ndim])
    header.set_qform(qform, code=1)
    header.set_sform(qform if sform is None else sform, code=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, None, header), path)  # affine None: the header stays as it is


def as_filed(native):
    """A native volume with its axes in the order of its file."""
    turn = native.orientation
    back = np.linalg.inv(orientation.index_matrix(turn, native.shape))
    label = native.label if native.label is None else orientation.to_file(native.label, turn)
    return native._replace(
        label=label,
        shape=tuple(native.shape[turn.axes.index(a)] for a in range(3)),
        affine=native.affine @ back,
        spacing_mm=tuple(native.spacing_mm[turn.axes.index(a)] for a in range(3)),
    )


def noise(seed, shape):
    return np.random.default_rng(seed).integers(0, 900, shape).astype(np.int16)


SFORM = oblique((0.7, 0.9, 3.0))  # says another spacing than pixdim
CORNER = (slice(2, 7), slice(9, 15), slice(1, 3))  # bright in T2
OTHER = (slice(12, 18), slice(3, 8), slice(0, 2))  # bright in ADC


def make_prostate(folder):
    """Two volumes in the layout of the archive, with the files that a Mac leaves in it."""
    for name in ("prostate_16", "prostate_00"):
        image = noise(int(name[-2:]), (20, 24, 4, 2)).astype(np.float32)
        image[(*CORNER, 0)] += 5000
        image[(*OTHER, 1)] += 5000
        label = np.zeros((20, 24, 4), np.float32)
        label[CORNER] = 1
        label[3:5, 10:13, 1] = 2
        sform = SFORM if name == "prostate_16" else None
        write(folder / "imagesTr" / f"{name}.nii.gz", image, sform=sform)
        write(folder / "labelsTr" / f"{name}.nii.gz", label, sform=sform)
        (folder / "imagesTr" / f"._{name}.nii.gz").write_bytes(b"\x00\x05\x16\x07")
    write(folder / "imagesTs" / "prostate_03.nii.gz", noise(3, (20, 24, 4, 2)))
    listing = {
        "name": "PROSTATE",
        "modality": {"0": "T2", "1": "ADC"},
        "labels": {"0": "background", "1": "PZ", "2": "TZ"},
        "training": [
            {"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"}
            for n in ("prostate_16", "prostate_00")
        ],
        "test": ["./imagesTs/prostate_03.nii.gz"],
    }
    (folder / "dataset.json").write_text(json.dumps(listing))
    (folder / "._dataset.json").write_bytes(b"\x00\x05\x16\x07")
    return folder


def tar_bytes(folder):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.add(folder, arcname=folder.name)
        junk = tarfile.TarInfo(f"._{folder.name}")
        junk.size = 4
        tar.addfile(junk, io.BytesIO(b"\x00\x05\x16\x07"))
    return buffer.getvalue()


def open_prostate(tmp_path, manual_dir="", target_spacing_mm=0.6):
    return open_prepared(
        "prostate",
        image_size=32,
        target_spacing_mm=target_spacing_mm,
        data_dir=str(tmp_path / "prepared"),
        manual_dir=str(manual_dir),
    )


def check_prostate(prepared):
    assert prepared.class_names == ("PZ", "TZ")
    assert set(prepared.volumes) == {"prostate_00", "prostate_16"}
    turned = prepared.read_native("prostate_16")
    assert orientation.letters_of(turned.affine) == "RAS"
    assert turned.shape == (24, 20, 4)
    native = as_filed(turned)
    assert native.shape == (20, 24, 4)
    np.testing.assert_allclose(native.spacing_mm, PIXDIM, rtol=1e-6)  # not those of the sform
    np.testing.assert_allclose(native.affine, SFORM, atol=1e-4)
    assert native.label.dtype == np.uint8
    # 5 x 6 x 2 voxels of the corner, of which 2 x 3 are class 2.
    assert np.bincount(native.label.ravel()).tolist() == [20 * 24 * 4 - 60, 54, 6]
    entry = prepared.volumes["prostate_16"]
    image, label = prepared.read_slices(entry.slices)
    assert image.shape == label.shape == (4, 32, 32)
    # Tilted by 50 degrees, the file's first axis is the nearest to the patient's second. There the
    # grid has the file's spacing: 2..6 of 20 come to lie at 8..12 of 32. The other's 0.8 mm become
    # 0.6 mm.
    columns = np.flatnonzero(label[1].any(axis=0))
    assert (columns.min(), columns.max()) == (8, 12)
    rows = np.flatnonzero(label[1].any(axis=1))
    assert len(rows) == round(6 * 0.8 / 0.6)
    # Channel 0, which is bright in the corner, and not channel 1.
    assert image[1][label[1] > 0].mean() > 5 * image[1][label[1] == 0].mean()


def test_prostate_from_a_folder(tmp_path, monkeypatch):
    """With a manual_dir nothing is downloaded; the folder above the task's will do as well."""
    monkeypatch.setattr(archive, "fetch_and_unpack", None)
    make_prostate(tmp_path / "manual" / "Task05_Prostate")
    check_prostate(open_prostate(tmp_path, tmp_path / "manual"))


def test_prostate_image_without_channels(tmp_path):
    path = tmp_path / "prostate_00.nii.gz"
    write(path, noise(0, (8, 8, 3)))
    with pytest.raises(nifti.VolumeError, match=r"\(8, 8, 3\).*4-D"):
        nifti.read_image(path, channel=0)
    write(path, noise(0, (8, 8, 3, 1)))
    with pytest.raises(nifti.VolumeError, match=r"\(8, 8, 3, 1\).*at least 2 channels"):
        nifti.read_image(path, channel=1)


@pytest.mark.parametrize(
    "listing", ["", "[]", '{"training": [{"image": "a"}]}', '{"training": []}']
)
def test_prostate_listing_unlike_msd(tmp_path, listing):
    (tmp_path / "dataset.json").write_text(listing)
    with pytest.raises(nifti.VolumeError, match=r"dataset\.json"):
        prostate.find_cases(tmp_path)


def test_prostate_without_listing_names_the_way_out(tmp_path):
    with pytest.raises(nifti.VolumeError, match=r"no .*dataset\.json.*data\.manual_dir"):
        prostate.find_cases(tmp_path)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requested.append(self.path)
        body, length = self.server.files.get(self.path, (None, None))
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """Serves `serve(body)` at the address it returns; `length` is what the header promises."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.files, httpd.requested = {}, []
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()

        def serve(body, length=None):
            httpd.files["/Task05_Prostate.tar"] = (body, len(body) if length is None else length)
            return f"http://127.0.0.1:{httpd.server_port}/Task05_Prostate.tar"

        serve.requested = httpd.requested
        yield serve
        httpd.shutdown()
        thread.join()


def test_prostate_downloads_the_archive(tmp_path, monkeypatch, server):
    body = tar_bytes(make_prostate(tmp_path / "Task05_Prostate"))
    monkeypatch.setattr(prostate, "ARCHIVE_URL", server(body))
    monkeypatch.setattr(prostate, "ARCHIVE_MD5", hashlib.md5(body).hexdigest())
    check_prostate(open_prostate(tmp_path))
    # The archive itself is not kept; the unpacked one serves another grid without a download.
    downloads = tmp_path / "prepared" / "downloads"
    assert not list(downloads.rglob("*.tar*"))
    folder = downloads / "Task05_Prostate"
    assert (folder / "Task05_Prostate" / "dataset.json").is_file()
    archive.fetch_and_unpack(prostate.ARCHIVE_URL, folder, md5=prostate.ARCHIVE_MD5)
    assert len(server.requested) == 1


def test_prostate_download_fails(tmp_path, monkeypatch, server):
    """The user reads what went wrong and what to do instead; no prepared set is left behind."""
    monkeypatch.setattr(prostate, "ARCHIVE_URL", server(b"abc"))
    with pytest.raises(nifti.VolumeError, match=r"found MD5 .*data\.manual_dir"):
        open_prostate(tmp_path)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


ABC_MD5 = "900150983cd24fb0d6963f7d28e17f72"  # of b"abc", RFC 1321


def test_fetch(tmp_path, server):
    archive.fetch(server(b"abc"), tmp_path / "file", md5=ABC_MD5)
    assert (tmp_path / "file").read_bytes() == b"abc"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("body", "length", "message"),
    [
        (b"abd", None, r"found MD5 4911e516e5aa21d327512e0c8b197616, wanted " + ABC_MD5),
        (b"ab", 3, r"2 of 3 bytes"),
        (None, 0, r"404"),
    ],
)
def test_fetch_keeps_nothing_on_failure(tmp_path, server, body, length, message):
    url = server(body, length)
    with pytest.raises(nifti.VolumeError, match=message):
        archive.fetch(url, tmp_path / "file", md5=ABC_MD5)
    assert not list(tmp_path.iterdir())


def test_fetch_without_a_server(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        port = httpd.server_port  # free again once the server is closed
    with pytest.raises(nifti.VolumeError, match=f"127.0.0.1:{port}.*download failed after 0"):
        archive.fetch(f"http://127.0.0.1:{port}/a.tar", tmp_path / "file", md5=ABC_MD5)


def member(name, kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    "bad",
    [
        member("../escaped"),
        member("a/../../escaped"),
        member("/escaped"),
        member("link", tarfile.SYMTYPE, "../.."),
        member("link", tarfile.SYMTYPE, "a"),
        member("link", tarfile.LNKTYPE, "/etc/hostname"),
        member("pipe", tarfile.FIFOTYPE),
    ],
    ids=lambda m: f"{m.name} {m.linkname}",
)
def test_archive_with_a_bad_member_is_refused(tmp_path, server, bad):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(member("a"))
        tar.addfile(bad)
    body = buffer.getvalue()
    folder = tmp_path / "downloads" / "task"
    with pytest.raises(nifti.VolumeError, match=f"refused.*{bad.name}"):
        archive.fetch_and_unpack(server(body), folder, md5=hashlib.md5(body).hexdigest())
    assert [p.name for p in tmp_path.rglob("*")] == ["downloads"]


@pytest.mark.parametrize("part", [0, 0.001, 0.3, 0.5])
def test_archive_cut_short_or_no_archive(tmp_path, server, part):
    """With the right digest: the publisher's file is broken."""
    body = tar_bytes(make_prostate(tmp_path / "Task05_Prostate"))
    body = body[: int(part * len(body))]
    folder = tmp_path / "downloads" / "task"
    with pytest.raises(nifti.VolumeError, match="not a whole tar archive"):
        archive.fetch_and_unpack(server(body), folder, md5=hashlib.md5(body).hexdigest())
    assert not list((tmp_path / "downloads").iterdir())


def make_mmwhs(folder):
    """Two labelled volumes and one without label. 1001: float labels, sform unlike pixdim, 421."""
    raw = np.zeros((20, 24, 5), np.float64)
    for column, value in enumerate((205, 420, 500, 550, 600, 820, 850)):
        raw[4:8, 3 * column : 3 * column + 2, 2] = value
    odd = raw.copy()
    odd[4:7, 3, 2] = 421
    odd[0, 0, 0] = 7
    write(folder / "mr_train_1001_image.nii.gz", noise(1, raw.shape), sform=SFORM)
    write(folder / "mr_train_1001_label.nii.gz", odd, sform=SFORM)
    write(folder / "mr_train_1011_image.nii.gz", noise(2, raw.shape).astype(np.uint16))
    write(folder / "mr_train_1011_label.nii.gz", raw.astype(np.uint16))
    write(folder / "mr_train_1020_image.nii.gz", noise(3, raw.shape))
    (folder / "._mr_train_1020_image.nii.gz").write_bytes(b"\x00\x05\x16\x07")
    write(folder / "ct_train_1001_image.nii.gz", noise(4, raw.shape))


def test_mmwhs(tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="lclseg")
    make_mmwhs(tmp_path / "manual" / "mr_train")
    prepared = open_prepared(
        "mmwhs",
        image_size=32,
        target_spacing_mm=0.6,
        data_dir=str(tmp_path / "prepared"),
        manual_dir=str(tmp_path / "manual"),
    )
    assert prepared.class_names == ("MYO", "LA", "LV", "RA", "RV", "AA", "PA")
    patients = {v.volume_id: v.patient_id for v in prepared.volumes.values()}
    assert patients == {f"mr_train_{n}": n for n in ("1001", "1011", "1020")}
    # Slices are those of the third axis, the nearest to the patient's.
    assert all(len(v.slices) == 5 for v in prepared.volumes.values())

    plain = as_filed(prepared.read_native("mr_train_1011")).label
    # Column 3 c holds class c + 1, in the order of the raw values.
    assert plain[5, ::3, 2].tolist() == [1, 2, 3, 4, 5, 6, 7, 0]
    assert np.bincount(plain.ravel()).tolist() == [20 * 24 * 5 - 56, *[8] * 7]

    odd = as_filed(prepared.read_native("mr_train_1001"))
    assert np.bincount(odd.label.ravel()).tolist() == [20 * 24 * 5 - 53, 8, 5, *[8] * 5]
    np.testing.assert_allclose(odd.spacing_mm, PIXDIM, rtol=1e-6)
    np.testing.assert_allclose(odd.affine, SFORM, atol=1e-4)

    blind = prepared.volumes["mr_train_1020"]
    assert not blind.has_label
    assert prepared.read_native("mr_train_1020").label is None

    # Reported for the one volume that has them.
    messages = [r.getMessage() for r in caplog.records if r.name == "lclseg"]
    [message] = [m for m in messages if "background" in m]
    assert "mr_train_1001_label.nii.gz" in message
    assert "7 (1 voxels), 421 (3 voxels)" in message


def test_mmwhs_label_already_mapped(tmp_path):
    """Classes in place of raw values would all become background: an error, not a warning."""
    write(tmp_path / "mr_train_1001_image.nii.gz", noise(0, (6, 7, 3)))
    labels = np.arange(6 * 7 * 3, dtype=np.int16).reshape(6, 7, 3) % 8
    write(tmp_path / "mr_train_1001_label.nii.gz", labels)
    (case,) = mmwhs.find_cases(tmp_path)
    with pytest.raises(nifti.VolumeError, match=r"1001.*found label values 0, 1, 2.*205, 420"):
        mmwhs.load(case)


@pytest.mark.parametrize(("shift", "fits"), [(5e-3, True), (5e-2, False)])
def test_mmwhs_affine_tolerance(tmp_path, shift, fits):
    image = tmp_path / "mr_train_1001_image.nii.gz"
    label = tmp_path / "mr_train_1001_label.nii.gz"
    write(image, noise(0, (6, 7, 3)))
    moved = oblique(PIXDIM)
    moved[0, 3] += shift
    moved[0, 0] += shift / 10
    write(label, np.full((6, 7, 3), 500, np.int16), sform=moved)
    (case,) = mmwhs.find_cases(tmp_path)
    if fits:
        assert (mmwhs.load(case).label == 3).all()
    else:
        with pytest.raises(nifti.VolumeError, match="lie differently in space"):
            mmwhs.load(case)


def test_mmwhs_folder_without_volumes(tmp_path):
    with pytest.raises(nifti.VolumeError, match=r"no mr_train_NNNN.*data\.manual_dir"):
        mmwhs.find_cases(tmp_path)
