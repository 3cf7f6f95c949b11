"""Sources, the index, the order, the loader, packing."""

import copy
import errno
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_photos, needs_real_data
from PIL import Image

from finetune_nb.data import SOURCES, load_images, source
from finetune_nb.data.augmenting import AUGMENTATIONS, augmentation
from finetune_nb.environment import FinetuneError, write_atomic
from finetune_nb.data.glyphs import CLASSES, DEFECTS, fonts_for, render_glyph
from finetune_nb.data.index import Images, from_arrays
from finetune_nb.data.decoding import MAX_PIXELS, BadImage, open_rgb
from finetune_nb.data.reading import ByteReader, open_index, save_index
from finetune_nb.data.sources import make_table, scan_folder


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels_of(images):
    return {key: np.asarray(images[i][0]) for i, key in enumerate(images.column("key"))}


def test_digits_are_the_real_ones():
    from sklearn.datasets import load_digits

    images = load_images("digits")
    assert len(images) == 1797 and images.counts("split").keys() == {"train", "valid", "test"}
    image, label = images[7]
    assert label == load_digits().target[7]
    assert np.array_equal(np.asarray(image)[..., 0], (load_digits().images[7] * 255 / 16).round())


def test_folder_without_splits_gets_a_stratified_one_and_keeps_it(photos):
    a, b = load_images(photos), load_images(photos)
    assert a.counts("split") == b.counts("split") and a.fingerprint() == b.fingerprint()
    for part in a.three_way():
        assert set(part.labels) == {0, 1, 2}
    keys = [set(part.column("key")) for part in a.three_way()]
    assert sum(map(len, keys)) == len(a) == len(set.union(*keys))


def test_given_splits_are_kept(tmp_path):
    images = load_images(make_photos(tmp_path, split=True))
    assert images.counts("split").keys() == {"train", "test"}
    train, valid, test = images.three_way()
    assert all(key.startswith("test/") for key in test.column("key"))
    assert all(key.startswith("train/") for key in [*train.column("key"), *valid.column("key")])


def as_tar(folder, path):
    with tarfile.open(path, "w") as tar:
        for file in sorted(folder.rglob("*.*")):
            tar.add(file, file.relative_to(folder))
    return path


def test_all_sources_give_the_same_images(photos, tmp_path):
    folder = load_images(photos)
    tar = load_images(as_tar(photos, tmp_path / "photos.tar"))
    parquet = load_images(folder.to_parquet(tmp_path / "photos.parquet"))
    packed = load_images(folder.pack(tmp_path / "packed", encoding="raw"))
    shards = load_images(str(tmp_path / "packed" / "shard-*.tar"))
    truth = pixels_of(folder)
    for other in (tar, parquet, packed, shards):
        found = pixels_of(other)
        assert other.classes == folder.classes
        assert {k: folder.classes[c] for k, c in zip(folder.column("key"), folder.labels)} == {
            k: other.classes[c] for k, c in zip(other.column("key"), other.labels)
        }
        assert found.keys() == truth.keys()
        assert all(np.array_equal(found[key], truth[key]) for key in truth)


def test_packed_shards_are_plain_webdataset(photos, tmp_path):
    load_images(photos).pack(tmp_path, encoding="jpeg", shard_bytes=60_000)
    shards = sorted(tmp_path.glob("shard-*.tar"))
    assert len(shards) > 1
    samples = {}
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                stem, kind = member.name.split(".", 1)
                samples.setdefault(stem, {})[kind] = tar.extractfile(member).read()
    assert len(samples) == 42
    for sample in samples.values():
        assert set(sample) == {"jpg", "json"} and json.loads(sample["json"])["label"].startswith(
            "class"
        )
        Image.open(io.BytesIO(sample["jpg"])).load()
    index = pq.read_table(tmp_path / "index.parquet")
    row = index.slice(17, 1).to_pylist()[0]
    with open(tmp_path / row["file"], "rb") as file:
        file.seek(row["offset"])
        assert Image.open(io.BytesIO(file.read(row["length"]))).format == "JPEG"


def test_brace_pattern_and_lists(photos, tmp_path):
    load_images(photos).pack(tmp_path, shard_bytes=60_000)
    n = len(list(tmp_path.glob("*.tar")))
    assert len(load_images(f"{tmp_path}/shard-{{000000..{n - 1:06d}}}.tar")) == 42
    assert len(load_images([tmp_path / f"shard-{i:06d}.tar" for i in range(n)])) == 42


def test_hugging_face_schema(photos, tmp_path):
    path = load_images(photos).to_parquet(tmp_path / "train.parquet")
    meta = json.loads(pq.read_schema(path).metadata[b"huggingface"])
    assert meta["info"]["features"]["image"]["_type"] == "Image"
    assert pq.read_table(path)["image"][0].as_py().keys() == {"bytes", "path"}


@pytest.mark.parametrize(
    "mode, colour",
    [
        ("L", 77),
        ("P", 3),
        ("CMYK", (0, 255, 255, 0)),
        ("LA", (200, 0)),
        ("RGBA", (255, 0, 0, 0)),
        ("1", 1),
        ("I;16", 30000),
        ("YCbCr", (76, 84, 255)),
        ("LAB", None),
        ("F", None),
    ],
)
def test_every_mode_becomes_rgb(mode, colour):
    if mode in ("LAB", "F"):
        image, kind = (
            Image.new("L", (8, 6), 50).convert("F")
            if mode == "F"
            else Image.new("LAB", (8, 6), (50, 128, 128)),
            "TIFF",
        )
    else:
        image, kind = (
            Image.new(mode, (8, 6), colour),
            "JPEG" if mode in ("CMYK", "YCbCr") else "PNG",
        )
    found = open_rgb(encoded(image, kind))
    assert found.mode == "RGB" and found.size == (8, 6)
    if mode in ("LA", "RGBA"):
        assert found.getpixel((0, 0)) == (255, 255, 255)  # nothing to see: paper, not black
    if mode == "I;16":
        assert abs(found.getpixel((0, 0))[0] - 30000 / 257) <= 1
    if mode == "CMYK":
        r, g, b = found.getpixel((0, 0))
        assert r > 200 and g < 60 and b < 60


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_rotation(turn):
    """Whatever the tag, the bright corner comes out at the top left."""
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8] = 255
    image = Image.fromarray(upright)
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[turn]
    stored = image if undo is None else image.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = turn
    for kind, options in (("PNG", {}), ("JPEG", dict(quality=100, subsampling=0))):
        found = np.asarray(open_rgb(encoded(stored, kind, exif=exif, **options)))
        assert found.shape == upright.shape and np.abs(found.astype(int) - upright).max() <= (
            8 if kind == "JPEG" else 0
        ), kind


def test_npy_members_are_read_without_unpickling():
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(BadImage):
        open_rgb(buffer.getvalue())


def options(**changes):
    return (
        dict(batch_size=16, size=24, shuffle=True, seed=3, epoch=2, augment="crop-flip") | changes
    )


@pytest.mark.parametrize(
    "augment", ["none", "shift", "flip", "crop-flip", "affine", "resized-crop-flip"]
)
def test_batches_do_not_depend_on_threads_or_batch_size(photos, augment):
    by_row = {}
    for workers, batch_size in ((0, 16), (3, 16), (1, 5)):
        images = load_images(photos).split(
            "train"
        )  # anew, so that each of them decodes and none finds the squares of another
        for batch in images.loader(
            **options(workers=workers, batch_size=batch_size, augment=augment)
        ):
            for pixels, row in zip(batch.pixels, batch.rows):
                assert np.array_equal(by_row.setdefault(int(row), pixels.numpy()), pixels.numpy())
    assert len(by_row) == len(images)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_the_same_global_batches(world):
    images = load_images("digits").split("train")
    whole = list(images.loader(**options()))
    ranks = [list(images.loader(**options(rank=r, world=world))) for r in range(world)]
    for i, batch in enumerate(whole):
        assert np.array_equal(np.concatenate([rank[i].rows for rank in ranks]), batch.rows)


def test_resume_in_the_middle_of_an_epoch():
    images = load_images("digits").split("train")
    whole = list(images.loader(**options()))
    rest = list(images.loader(**options(start=whole[4].next_position)))
    assert len(rest) == len(whole) - 5
    for a, b in zip(whole[5:], rest):
        assert np.array_equal(a.rows, b.rows) and (a.pixels == b.pixels).all()


def test_a_last_batch_of_one_joins_the_one_before():
    images = from_arrays(np.zeros((33, 8, 8), np.uint8), np.arange(33) % 2)
    sizes = [len(b.rows) for b in images.loader(batch_size=16, size=8, shuffle=True)]
    assert sizes == [16, 17]


def test_one_bad_image_is_set_aside(photos, tmp_path):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(photos, folder)
    (folder / "class0" / "zero.jpg").write_bytes(b"")
    (folder / "class0" / "text.jpg").write_text("no image")
    whole = (folder / "class0" / "000.jpg").read_bytes()
    (folder / "class0" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    loader = load_images(folder).loader(batch_size=8, size=16)
    assert sum(len(b.rows) for b in loader) == 42
    reasons = " ".join(loader.bad.values())
    assert len(loader.bad) == 3 and "0 bytes" in reasons and "truncated" in reasons


def test_a_bomb_is_not_decoded():
    assert 30_000 * 30_000 > MAX_PIXELS
    data = encoded(Image.new("1", (30_000, 30_000)))
    begin = time.process_time()
    with pytest.raises(BadImage, match="pixels"):
        open_rgb(data)
    assert time.process_time() - begin < 1


def test_unreadable_file_and_dangling_link(tmp_path):
    folder = make_photos(tmp_path, classes=2, each=6)
    (folder / "class0" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    loader = load_images(folder).loader(batch_size=8, size=16)
    assert sum(len(b.rows) for b in loader) == 12 and len(loader.bad) == 1


@pytest.mark.parametrize(
    "prepare, words",
    [
        (lambda p: p / "missing", "does not exist"),
        (lambda p: p, "holds no images"),
        (
            lambda p: [
                (p / "a").mkdir(),
                Image.new("RGB", (9, 9)).save(p / "a" / "1.png"),
                (p / "b").mkdir(),
                p,
            ][-1],
            "is empty",
        ),
        (
            lambda p: [(p / "a").mkdir(), Image.new("RGB", (9, 9)).save(p / "a" / "1.png"), p][-1],
            "one class only",
        ),
        (
            lambda p: [
                (p / "a").mkdir(),
                Image.new("RGB", (9, 9)).save(p / "a" / "1.png"),
                Image.new("RGB", (9, 9)).save(p / "1.png"),
                p,
            ][-1],
            "beside the class folders",
        ),
        (lambda p: [(p / "x.zip").write_bytes(b"PK"), p / "x.zip"][-1], "neither"),
        (
            lambda p: [(p / "x.tar").write_bytes(b"not a tar" * 100), p / "x.tar"][-1],
            "not a plain tar",
        ),
        (lambda p: [(p / "x.parquet").write_bytes(b"PAR1"), p / "x.parquet"][-1], "Parquet"),
        (
            lambda p: [pq.write_table(pa.table({"a": [1]}), p / "x.parquet"), p / "x.parquet"][-1],
            "image",
        ),
        (lambda p: str(p / "shard-*.tar"), "no file matches"),
    ],
)
def test_bad_sources_say_what_is_wrong(prepare, words, tmp_path):
    with pytest.raises(FinetuneError, match=words) as caught:
        load_images(prepare(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_labels_that_do_not_fit(photos, tmp_path):
    path = load_images(photos).to_parquet(tmp_path / "p.parquet")
    table = pq.read_table(path)
    pq.write_table(
        table.set_column(1, "label", pa.array([7] * len(table))).replace_schema_metadata(
            table.schema.metadata
        ),
        path,
    )
    with pytest.raises(FinetuneError, match="outside the 3 class names"):
        load_images(path)
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name in ("0.jpg", "1.jpg", "0.cls"):
            data = encoded(Image.new("RGB", (8, 8)), "JPEG") if name.endswith("jpg") else b"cat"
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(FinetuneError, match="1.jpg has no label"):
        load_images(tmp_path / "s.tar")
    with pytest.raises(FinetuneError, match="one label for each"):
        from_arrays(np.zeros((4, 8, 8), np.uint8), [0, 1])
    with pytest.raises(FinetuneError, match="uint8"):
        from_arrays(np.zeros((4, 8, 8)), [0, 1, 0, 1])


def test_a_class_without_training_images(tmp_path):
    folder = make_photos(tmp_path, split=True)
    import shutil

    shutil.rmtree(folder / "train" / "class1")
    with pytest.raises(FinetuneError, match="class1 has no training image"):
        load_images(folder)


def test_damaged_index_is_named(tmp_path):
    table = save_index(load_images("digits").table, tmp_path / "i.arrow")
    assert len(table) == 1797
    (tmp_path / "i.arrow").write_bytes((tmp_path / "i.arrow").read_bytes()[:1000])
    with pytest.raises(FinetuneError, match="damaged"):
        open_index(tmp_path / "i.arrow")


def big_table(n):
    table = make_table(
        [f"{i:09d}" for i in range(n)],
        "/nowhere.tar",
        np.arange(n) * 512,
        np.full(n, 500),
        np.arange(n) % 10,
        ["train"] * n,
        [str(i) for i in range(10)],
    )
    return table


MEMORY = """
import resource, sys
import numpy as np
from finetune_nb.data.batches import epoch_order
from finetune_nb.data.index import Images
from finetune_nb.data.reading import open_index
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
images = Images(open_index(sys.argv[1]))
images = images.split("train") if sys.argv[2] == "split" else images
for position in range(0, len(images), max(1, len(images)//500)):
    places = epoch_order(len(images), 0, 0, np.arange(position, min(position + 64, len(images))))
    images.labels_at(places)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_stays_flat_when_the_table_grows_tenfold(tmp_path):
    """Pages of the mapped file that are touched count as resident; what must not grow is what
    the process itself keeps."""
    grown = []
    for n in (200_000, 2_000_000):
        path = tmp_path / f"{n}.arrow"
        save_index(big_table(n), path)
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(path), "all"],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        grown.append(int(done.stdout) / 1024)
    label_pages = 2_000_000 * 4 / 2**20
    assert grown[1] - grown[0] < 2 * label_pages + 8, f"{grown[0]:.0f} MB, then {grown[1]:.0f} MB"


def test_scanning_asks_the_file_system_once(tmp_path):
    folder = tmp_path / "many"
    for c in range(4):
        (folder / f"c{c}").mkdir(parents=True)
        for i in range(500):
            (folder / f"c{c}" / f"{i}.jpg").write_bytes(b"x")
    table = scan_folder(folder)
    assert len(table) == 2000 and table["length"].to_pylist() == [1] * 2000
    assert table["key"].to_pylist() == sorted(table["key"].to_pylist())


def test_glyphs_are_a_pure_function():
    a, b = render_glyph(5, 17), render_glyph(5, 17)
    assert np.array_equal(a[0], b[0]) and a[1] == b[1]
    assert not np.array_equal(render_glyph(6, 17)[0], a[0])
    assert len(set(CLASSES)) == len(CLASSES) and all(fonts_for(c) for c in CLASSES)
    few, many = load_images("glyphs", limit=100, seed=9), load_images("glyphs", limit=200, seed=9)
    assert np.array_equal(few.memory[:100], many.memory[:100])


def test_planted_defects_keep_the_truth():
    shares = {"label": 0.1, "noise": 0.05, "duplicate": 0.02, "outlier": 0.01}
    images = load_images("glyphs", limit=1000, seed=1, defects=shares)
    kinds, true, given = (
        images.column("true_defect").astype(str),
        images.column("true_label"),
        images.labels,
    )
    assert {kind: (kinds == kind).sum() for kind in DEFECTS} == {
        kind: round(share * 1000) for kind, share in shares.items()
    }
    assert (true[kinds == "label"] != given[kinds == "label"]).all() and (
        true[kinds != "label"] == given[kinds != "label"]
    ).all()
    clean = load_images("glyphs", limit=1000, seed=1)
    assert np.array_equal(images.memory[kinds == ""], clean.memory[kinds == ""])
    with pytest.raises(FinetuneError, match="defects"):
        load_images("digits", defects={"label": 0.1})
    with pytest.raises(FinetuneError, match="blur"):
        load_images("glyphs", limit=50, defects={"blur": 0.1})


def test_few_divide_limited():
    images = load_images("digits").split("train")
    assert np.bincount(images.few(3, 1).labels).tolist() == [3] * 10
    rest, part = images.divide(0.25, 7)
    assert len(rest) + len(part) == len(images) and not set(rest.column("key")) & set(
        part.column("key")
    )
    share = np.bincount(part.labels) / np.bincount(images.labels)
    assert (abs(share - 0.25) < 0.02).all()
    some = images.limited(200, 2)
    assert (
        len(some) == 200
        and (
            abs(np.bincount(some.labels) - np.bincount(images.labels) * 200 / len(images)) < 1.5
        ).all()
    )


@needs_real_data
def test_real_tar_and_folder():
    images = load_images("cifar10")
    assert images.counts("split") == {"train": 50_000, "test": 10_000} and len(images.classes) == 10
    image, label = images.split("test")[123]
    assert image.size == (32, 32)
    ants = load_images("hymenoptera")
    assert ants.classes == ("ants", "bees") and ants.counts("split")["valid"] == 153


def test_download_code_against_a_loopback_server(tmp_path, monkeypatch):
    """torchvision's own download and extraction, with the address turned to this machine and the
    checksums of what it serves."""
    import functools
    import hashlib
    import http.server
    import pickle
    import threading

    import torchvision.datasets as sets

    served = tmp_path / "served"
    (served / "cifar-10-batches-py").mkdir(parents=True)
    rng = np.random.default_rng(0)
    sums = {}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
        content = (
            {"label_names": [f"kind{i}" for i in range(10)]}
            if name == "batches.meta"
            else {
                "data": rng.integers(0, 256, (20, 3072), dtype=np.uint8),
                "labels": [i % 10 for i in range(20)],
            }
        )
        data = pickle.dumps(content)
        (served / "cifar-10-batches-py" / name).write_bytes(data)
        sums[name] = hashlib.md5(data).hexdigest()
    with tarfile.open(served / "cifar-10-python.tar.gz", "w:gz") as tar:
        tar.add(served / "cifar-10-batches-py", "cifar-10-batches-py")
    handler_class = type(
        "Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *a: None}
    )
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler_class, directory=str(served))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        monkeypatch.setattr(
            sets.CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/cifar-10-python.tar.gz"
        )
        monkeypatch.setattr(
            sets.CIFAR10,
            "tgz_md5",
            hashlib.md5((served / "cifar-10-python.tar.gz").read_bytes()).hexdigest(),
        )
        monkeypatch.setattr(
            sets.CIFAR10, "train_list", [[n, sums[n]] for n in sorted(sums) if n.startswith("data")]
        )
        monkeypatch.setattr(sets.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
        monkeypatch.setattr(
            sets.CIFAR10,
            "meta",
            {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]},
        )
        images = load_images("cifar10", root=tmp_path / "root")
        assert images.counts("split") == {"train": 100, "test": 20} and images.classes[0] == "kind0"
        assert np.asarray(images[0][0]).shape == (32, 32, 3)
    finally:
        server.shutdown()
    again = load_images(
        "cifar10", root=tmp_path / "root"
    )  # the server is gone: what was packed is found
    assert len(again) == 120
    monkeypatch.setattr(sets.CIFAR10, "url", "http://127.0.0.1:9/none.tar.gz")
    with pytest.raises(FinetuneError, match="could not be downloaded"):
        load_images("cifar10", root=tmp_path / "other")


def test_images_without_labels_can_be_predicted_but_not_trained(tmp_path):
    for i in range(4):
        Image.new("RGB", (20, 20), (i * 40, 0, 0)).save(tmp_path / f"{i}.png")
    images = load_images(tmp_path)
    assert len(images) == 4 and images.classes == () and set(images.labels) == {-1}


def test_select_refuses_a_mask_of_another_length():
    with pytest.raises(FinetuneError, match="mask"):
        load_images("digits").select(np.ones(3, bool))
    assert isinstance(load_images("digits").select([1, 2, 3]).rows, range)
    assert isinstance(load_images("digits"), Images)


def chunked(n=9):
    """An index in three chunks whose dictionaries differ, as a large Parquet file is read."""
    parts = []
    for i, name in enumerate(("train", "test", "valid")):
        images = from_arrays(np.zeros((n, 4, 4), np.uint8), np.arange(n) % 3, splits=[name] * n)
        parts.append(images.table)
    return pa.concat_tables(parts)


def test_a_table_in_chunks_is_read_whole(tmp_path):
    table = chunked()
    assert table["split"].num_chunks == 3
    pixels = np.arange(27, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    images = Images(table, memory=pixels)
    assert len(images.labels) == 27
    assert images.counts("split") == {"train": 9, "test": 9, "valid": 9}
    assert set(np.asarray(images.split("valid").rows).tolist()) == set(range(18, 27))
    again = Images(save_index(table, tmp_path / "i.arrow"), memory=pixels)
    assert again.table["label"].num_chunks == 1 and again.fingerprint() == images.fingerprint()


def test_keys_that_do_not_fit_one_chunk_become_one(monkeypatch):
    """What 2 GiB of keys do: a column that stays in chunks. Here combining is stopped short of
    it."""
    from finetune_nb.data import reading

    class Stubborn:
        """A table whose string column does not combine."""

        def __init__(self, table):
            self.table = table

        column_names = property(lambda self: self.table.column_names)
        __getitem__ = lambda self, name: self.table[name]  # noqa: E731
        unify_dictionaries = lambda self: self  # noqa: E731

        def combine_chunks(self):
            whole = self.table.unify_dictionaries().combine_chunks()
            return whole.set_column(0, "key", self.table["key"])

    whole = reading.whole_table(Stubborn(chunked()))
    assert whole["key"].num_chunks == 1 and pa.types.is_large_string(whole["key"].type)
    assert whole["key"].to_pylist() == chunked()["key"].to_pylist()


def test_a_packed_index_of_many_row_groups(tmp_path):
    """The reader gives a Parquet file in chunks; each has a dictionary of its own."""
    folder = load_images("digits", limit=40).pack(tmp_path / "p", encoding="raw")
    before = load_images(folder)
    table = pq.read_table(folder / "index.parquet")
    order = np.argsort(table["split"].to_numpy())
    pq.write_table(table.take(order), folder / "index.parquet", row_group_size=7)
    after = load_images(folder)
    assert after.counts("split") == before.counts("split") and len(after.labels) == 40


@pytest.mark.parametrize("places", [[0, 6], [-7], [1.0], [[0, 1]], ["a"], [True, False]])
def test_select_refuses_what_lies_outside(places):
    images = from_arrays(
        np.zeros((10, 4, 4), np.uint8), np.arange(10) % 2, splits=["train"] * 6 + ["test"] * 4
    )
    with pytest.raises(FinetuneError):
        images.split("train").select(places)
    for method in (images.split("train").rows_at, images.split("train").labels_at):
        with pytest.raises(FinetuneError, match="outside"):
            method([6])


def test_rows_may_repeat_and_count_from_the_end():
    images = load_images("digits", limit=60)
    chosen = images.select([3, 3, -1, 0])
    rows = np.concatenate([b.rows for b in chosen.loader(batch_size=3, size=8)])
    assert rows.tolist() == chosen.rows_at([0, 1, 2, 3]).tolist() and rows[0] == rows[1]
    assert len(chosen.column("key")) == 4 and chosen.select([]).rows_at([]).tolist() == []


@pytest.mark.parametrize("kind", ["folder", "memory", "parquet", "raw"])
def test_images_are_pickled_and_copied(tmp_path, kind):
    images = load_images(make_photos(tmp_path / "p", 2, 6))
    if kind == "memory":
        images = load_images("digits", limit=12)
    if kind == "parquet":
        images = load_images(images.to_parquet(tmp_path / "x.parquet"))
    if kind == "raw":
        images = load_images(images.pack(tmp_path / "k", size=16, encoding="raw"))
    part = images.select([2, 0, 5])
    part[0]  # a file is open
    for again in (pickle.loads(pickle.dumps(part)), copy.deepcopy(part), copy.copy(part)):
        assert again.classes == part.classes and again.fingerprint() == part.fingerprint()
        assert np.array_equal(np.asarray(again[1][0]), np.asarray(part[1][0]))


def png(seed, size=12):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def picture_folder(folder, seed=0, n=5):
    for c in "ab":
        (folder / c).mkdir(parents=True)
        for i in range(n):
            (folder / c / f"{i}.png").write_bytes(png([seed, ord(c), i]))
    return folder


def test_identity_follows_contents(tmp_path):
    """The same bytes elsewhere are the same set; other bytes, names or labels are another."""
    first = picture_folder(tmp_path / "one")
    shutil.copytree(first, tmp_path / "two")
    a, b = load_images(first), load_images(tmp_path / "two")
    assert a.fingerprint() == b.fingerprint()
    (tmp_path / "two" / "b").rename(tmp_path / "two" / "c")
    assert load_images(tmp_path / "two").fingerprint() != a.fingerprint()
    assert a.select([1, 0]).fingerprint() != a.select([0, 1]).fingerprint()


@pytest.mark.parametrize("keep_time", [False, True])
def test_a_picture_replaced_in_place_is_noticed(tmp_path, keep_time):
    """Same name, same size; also where the old modification time was put back."""
    folder = picture_folder(tmp_path / "d")
    path = folder / "a" / "2.png"
    images = load_images(folder)
    before = images.fingerprint()
    assert list(images.loader(batch_size=10, size=8))
    old, stat = path.read_bytes(), path.stat()
    new = old[:60] + bytes([old[60] ^ 255]) + old[61:]
    path.write_bytes(new)
    if keep_time:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert images.fingerprint() != before and load_images(folder).fingerprint() != before
    assert not images.shared["caches"]  # nothing that was decoded before is handed out
    path.write_bytes(old)
    assert images.fingerprint() == before


def test_unchanged_files_are_not_read_again(tmp_path, monkeypatch):
    folder = picture_folder(tmp_path / "d")
    for path in folder.rglob("*.png"):
        os.utime(path, (10**9, 10**9))
    reads = []
    original = ByteReader._whole
    monkeypatch.setattr(ByteReader, "_whole", lambda s, f: reads.append(f) or original(s, f))
    # Times of change cannot be set: the clock of the hashing is moved on instead.
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 10**10)
    before = load_images(folder).fingerprint()
    assert len(reads) == 10
    assert load_images(folder).fingerprint() == before and len(reads) == 10
    monkeypatch.setattr(time, "time_ns", now)
    (folder / "b" / "1.png").write_bytes(png(99))
    changed = load_images(folder).fingerprint()
    assert changed != before and len(reads) == 11
    # Changed just now: within a clock's step it might change again, so it is not trusted.
    assert load_images(folder).fingerprint() == changed and len(reads) == 12


@pytest.mark.parametrize("kind", ["tar", "parquet", "raw"])
def test_contents_decide_in_containers_too(tmp_path, kind):
    made = []
    for name, shift in (("a", 0), ("b", 1), ("c", 0)):
        folder = picture_folder(tmp_path / name, seed=shift)
        path = tmp_path / f"{name}.{kind}"
        if kind == "tar":
            with tarfile.open(path, "w") as tar:
                tar.add(folder, ".")
        elif kind == "parquet":
            load_images(folder).to_parquet(path)
        else:
            load_images(folder).pack(path, encoding="raw")
        made.append(load_images(path))
    a, b, c = (images.fingerprint() for images in made)
    assert a == c != b and made[0].fingerprint() == a


def test_a_tar_changed_in_place_gives_no_stale_index(tmp_path):
    path = tmp_path / "x.tar"

    def write(seed):
        with tarfile.open(path, "w") as tar:
            tar.add(picture_folder(tmp_path / str(seed), seed), ".")

    write(0)
    old = load_images(path)
    before = old.fingerprint()
    write(1)
    new = load_images(path)
    assert new.fingerprint() != before
    assert np.array_equal(
        np.asarray(new[0][0]), np.asarray(open_rgb((tmp_path / "1" / "a" / "0.png").read_bytes()))
    )
    with pytest.raises(FinetuneError, match="changed since its images were indexed"):
        old.fingerprint()


def test_open_files_are_bounded(tmp_path, monkeypatch):
    from finetune_nb.data import reading

    monkeypatch.setattr(reading, "OPEN_FILES", 3)
    paths = []
    for i in range(12):
        paths.append(tmp_path / f"train-{i:02d}.tar")
        with tarfile.open(paths[-1], "w") as tar:
            tar.add(picture_folder(tmp_path / str(i), i, 2), ".")
    images = load_images(paths)
    loader = images.loader(batch_size=5, size=8, workers=3, shuffle=True)
    assert sum(len(b.rows) for b in loader) == len(images) == 48 and not loader.bad
    assert len(images.shared["reader"].open) <= 3


def test_too_many_open_files_is_named(tmp_path, monkeypatch):
    images = load_images(picture_folder(tmp_path / "d"))

    def full(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(FinetuneError, match="ulimit"):
        images.read(0)


@pytest.mark.parametrize("kind", ["pack", "raw", "parquet"])
def test_classes_keep_their_order_and_number(tmp_path, kind):
    """Names that sort otherwise, and one that no picture has."""
    names = ["zero", "two", "10", "none", "9"]
    pixels = np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), np.uint8)
    labels = np.arange(24) % 5
    labels[labels == 3] = 0
    images = from_arrays(pixels, labels, names, ["train"] * 16 + ["test"] * 8)
    if kind == "parquet":
        path = images.to_parquet(tmp_path / "x.parquet")
    else:
        path = images.pack(tmp_path / "p", encoding="raw" if kind == "raw" else "jpeg")
    again = load_images(path)
    assert list(again.classes) == names and again.labels.tolist() == labels.tolist()
    part = again.select(again.labels == 2)
    assert list(load_images(part.pack(tmp_path / "q")).classes) == names


def test_a_row_group_is_not_read_for_every_row(tmp_path, monkeypatch):
    images = load_images("digits")
    path = images.to_parquet(tmp_path / "x.parquet")
    again, count = load_images(path), []
    original = pq.ParquetFile.read_row_group

    def counted(self, *a, **k):
        count.append(a)
        return original(self, *a, **k)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    assert sum(len(b.rows) for b in again.loader(batch_size=64, shuffle=True, size=8)) == 1797
    assert len(count) == 2


def test_what_is_set_aside_can_be_read_while_threads_add_to_it(tmp_path):
    images = load_images(picture_folder(tmp_path / "d", n=30))
    for path in (tmp_path / "d" / "b").iterdir():
        path.write_bytes(b"broken")
    loader = images.loader(batch_size=4, size=8, workers=3)
    seen, held = {}, sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in loader:
            seen |= {row: reason for row, reason in loader.bad.items()}
    finally:
        sys.setswitchinterval(held)
    assert len(seen) == 30
    loader.bad.clear()
    assert len(loader.bad) == 30  # what is handed out is a copy


def test_interpolation_reaches_the_pixels(tmp_path):
    images = load_images(picture_folder(tmp_path / "d"))
    made = {
        name: next(iter(images.loader(batch_size=4, size=8, interpolation=name))).pixels
        for name in ("bilinear", "bicubic")
    }
    assert (made["bilinear"] != made["bicubic"]).any()
    wanted = np.asarray(images[0][0].resize((8, 8), Image.Resampling.BICUBIC))
    assert np.array_equal(made["bicubic"][0].permute(1, 2, 0).numpy(), wanted)
    with pytest.raises(FinetuneError, match="bilinear, bicubic"):
        images.loader(interpolation="best")


def test_ctrl_c_leaves_no_temporary_file(tmp_path):
    def stopped(temporary):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "f", stopped)
    assert not list(tmp_path.iterdir())


def test_images_say_what_they_are(tmp_path):
    text = repr(load_images(make_photos(tmp_path / "p", 3, 8)).select([0, 1, 2]))
    assert "3 rows" in text and "class0" in text and str(tmp_path) not in text
    assert "in memory" in repr(load_images("digits"))


def test_a_source_of_ones_own_is_one_function(tmp_path):
    """Registered by name; it may give images or paths, and its options are checked."""
    folder = picture_folder(tmp_path / "d")

    @source("ours")
    def ours(root, limit, seed, shade=10):
        return from_arrays(np.full((6, 4, 4), shade, np.uint8), np.arange(6) % 2)

    @source("theirs")
    def theirs(root, limit, seed):
        return folder

    try:
        assert load_images("ours", shade=30).memory[0, 0, 0, 0] == 30
        assert len(load_images("ours", limit=4)) == 4
        assert load_images("theirs").fingerprint() == load_images(folder).fingerprint()
        with pytest.raises(FinetuneError, match="has no option colour: it takes shade"):
            load_images("ours", colour=1)
        with pytest.raises(FinetuneError, match="ours"):
            load_images(tmp_path / "nothing")
        with pytest.raises(FinetuneError, match="takes no option defects"):
            load_images(folder, defects={"label": 0.1})
    finally:
        del SOURCES["ours"], SOURCES["theirs"]


def test_an_augmentation_of_ones_own_is_one_function(tmp_path):
    images = load_images(picture_folder(tmp_path / "d"))

    @augmentation("dim", numbers=11, cuts=True)
    def dim(pixels, u):
        assert u.shape == (len(pixels), 11)
        return (pixels * u[:, 10, None, None, None]).astype(np.uint8)

    try:
        a, b = (
            np.concatenate(
                [x.pixels.numpy() for x in images.loader(batch_size=n, size=8, augment="dim")]
            )
            for n in (3, 10)
        )
        assert np.array_equal(a, b) and images.loader(size=8, augment="dim").cache is None
    finally:
        del AUGMENTATIONS["dim"]
    with pytest.raises(FinetuneError, match="none, shift, flip"):
        images.loader(augment="dim")


def test_shift_and_flip_move_whole_pixels():
    """Against plain indexing: nothing is interpolated, edges are repeated."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
    u = np.random.default_rng(1).random((5, 8))
    shifted = AUGMENTATIONS["shift"](pixels, u)
    flipped = AUGMENTATIONS["flip"](pixels, u)
    for i in range(5):
        rows, columns = (np.arange(16) + int(u[i, j] * 5) - 2 for j in (0, 1))
        wanted = pixels[i][rows.clip(0, 15)][:, columns.clip(0, 15)]
        assert np.array_equal(shifted[i], wanted)
        assert np.array_equal(flipped[i], pixels[i, :, ::-1] if u[i, 2] < 0.5 else pixels[i])


def test_names_are_shown_as_they_are():
    """A class that is called like an HTML element is text wherever a table shows it."""
    pixels = np.zeros((4, 8, 8, 3), np.uint8)
    shown = from_arrays(pixels, [0, 1, 0, 1], ["<b>", "a & b"])._repr_html_()
    assert "&lt;b&gt;" in shown and "a &amp; b" in shown and "<b>" not in shown
