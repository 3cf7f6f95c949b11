"""The photographs that ship: what they hold, their card, and how they are cut."""

import hashlib
import os
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import PIL
import pytest
from conftest import ROOT

from finetune_nb import environment
from finetune_nb.data import load_images
from finetune_nb.data.photos import PHOTO_CLASSES, cut_photos
from finetune_nb.environment import FinetuneError


def test_photographs_ship(tmp_path, monkeypatch):
    """Small, licensed, read without a network, from a checkout and from a wheel."""
    card = (ROOT / "data" / "photos.md").read_text(encoding="utf-8")
    tar = ROOT / "data" / "photos.tar"
    assert tar.stat().st_size < 8_000_000
    assert hashlib.sha256(tar.read_bytes()).hexdigest() in card
    for said in ("CC BY 4.0", "Ranzato", "Caltech 101", "Changes"):
        assert said in card
    images = load_images("photos")
    assert 700 <= len(images) <= 1000 and 16 <= len(images.classes) <= 20
    assert set(images.classes) == set(PHOTO_CLASSES)
    train, valid, test = images.three_way()
    assert len(test) >= 300 and set(train.labels) == set(range(len(images.classes)))
    assert not set(train.rows) & set(valid.rows)
    for i, name in enumerate(images.classes):
        assert f"| {name} | {(images.split('train').labels == i).sum()} " in card
        assert 10 <= (test.labels == i).sum() <= 20
    assert all(min(images[i][0].size) <= 160 for i in range(0, len(images), 40))
    share = tmp_path / "share" / "finetune_nb"
    share.mkdir(parents=True)
    (share / "photos.tar").write_bytes(tar.read_bytes())
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(
        environment.importlib.util,
        "find_spec",
        lambda name: SimpleNamespace(origin=tmp_path / "a/b"),
    )
    assert environment.shipped_file("photos.tar") == share / "photos.tar"
    assert load_images("photos").fingerprint() == images.fingerprint()


def test_photographs_are_cut_again_byte_for_byte(tmp_path):
    source = Path(os.environ.get("FINETUNE_NB_DATA", "")) / "caltech101.tar"
    if not source.is_file():
        pytest.skip("Caltech-101 does not lie beside the checkout")
    cut = cut_photos(source, tmp_path / "photos.tar")
    with tarfile.open(cut) as ours, tarfile.open(ROOT / "data" / "photos.tar") as shipped:
        assert ours.getnames() == shipped.getnames()
    if PIL.__version__ == "13.0.0":  # another version may encode the same pixels in other bytes
        assert cut.read_bytes() == (ROOT / "data" / "photos.tar").read_bytes()


def test_photographs_of_another_tar_are_refused(tmp_path):
    with tarfile.open(tmp_path / "other.tar", "w"):
        pass
    with pytest.raises(FinetuneError, match="lacks the classes beaver"):
        cut_photos(tmp_path / "other.tar", tmp_path / "photos.tar")
