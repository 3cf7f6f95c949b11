"""Training steps a second: `fit` against a plain PyTorch loop — same net, data, optimizer, threads
and number of steps."""

import tempfile

import numpy as np
import torch
import torch.nn.functional as F
from common import compare, jpeg_folder
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from finetune_nb.data import load_images
from finetune_nb.data.index import from_arrays
from finetune_nb.models import IMAGENET_MEAN, IMAGENET_STD, load_resnet
from finetune_nb.training import Recipe, fit


def plain_loop(loader, arch="resnet20", epochs=1, classes=10):
    net = load_resnet(arch, None, classes).train()
    optimizer = torch.optim.SGD(
        net.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.05, total_steps=epochs * len(loader)
    )
    for _ in range(epochs):
        for x, y in loader:
            loss = F.cross_entropy(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def plain_loader(folder, size):
    "torchvision's own pipeline for what `crop-flip` does."
    steps = transforms.Compose(
        [
            transforms.Resize(size),
            transforms.CenterCrop(size),
            transforms.RandomCrop(size, size // 8),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    return DataLoader(ImageFolder(folder, steps), batch_size=64, shuffle=True, num_workers=2)


def ours(images, arch="resnet20", epochs=1, augment="none", size=32):
    fit(
        load_resnet(arch, None, 10),
        images,
        recipe=Recipe(
            epochs=epochs, batch_size=64, lr=0.05, augment=augment, clip_norm=0, size=size
        ),
        progress=False,
    )


def in_memory(n=1920):
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (n, 32, 32, 3), np.uint8), rng.integers(0, 10, n)
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    x = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std
    loader = DataLoader(
        TensorDataset(x.contiguous(), torch.from_numpy(labels)), batch_size=64, shuffle=True
    )
    images = from_arrays(pixels, labels)
    compare(
        "training, tensors in memory (resnet20, 32 px)",
        lambda: ours(images),
        lambda: plain_loop(loader),
        n / 64,
        "steps",
    )


def from_files(folder, size, arch, name, epochs):
    loader = plain_loader(folder, size)
    work = epochs * len(loader.dataset) / 64
    compare(
        name,
        lambda: ours(load_images(folder), arch, epochs, "crop-flip", size),
        lambda: plain_loop(loader, arch, epochs),
        work,
        "steps",
        repeats=2,
    )


def read_only(folder, size, name):
    """The loader alone, first epoch (decoding) and second (decoded squares are kept)."""
    loader = plain_loader(folder, size)

    def plain():
        for _x, _y in loader:
            pass

    def read(images):
        for _batch in images.loader(batch_size=64, size=size, augment="crop-flip", shuffle=True):
            pass

    kept = load_images(folder)
    n = len(kept)
    compare(
        f"{name}, loading alone, first epoch", lambda: read(load_images(folder)), plain, n, "images"
    )
    read(kept)
    compare(f"{name}, loading alone, later epochs", lambda: read(kept), plain, n, "images")


if __name__ == "__main__":
    print(f"{torch.get_num_threads()} threads")
    in_memory()
    with tempfile.TemporaryDirectory() as small, tempfile.TemporaryDirectory() as large:
        jpeg_folder(small, 2000)
        read_only(small, 32, "JPEG 32 px")
        from_files(small, 32, "resnet20", "training from JPEG files (resnet20, 32 px), 3 epochs", 3)
        jpeg_folder(large, 400, 256)
        read_only(large, 32, "JPEG 384×256 → 32 px")
        from_files(large, 32, "resnet20", "training from JPEG files (384×256 → 32 px), 3 epochs", 3)
