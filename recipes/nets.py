"""Images and small nets that recipes train from nothing: Fashion-MNIST with a ResNet-20, scikit-learn's digits."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from addenda import AddendaError
from addenda.data import idx


@dataclass(frozen=True)
class Task:
    """Images (n × 1 × h × w) and labels of train, validation and test; how to train on them."""

    parts: dict[str, tuple[Tensor, Tensor]]
    net: type[nn.Module]
    epochs: int
    rate: float
    batch: int
    shift: int  # pixels of a random crop's padding, and whether images are flipped; 0: neither


def fashion(images: int, test: int) -> Task:
    """Return Fashion-MNIST with a ResNet-20: so many images to learn from, 2,000 to choose by, so many to judge by."""
    files = idx.parts(idx.located(idx.FASHION))
    train, held = (idx.load(*files[split]) for split in ("train", "test"))
    if images + 2000 > len(train[1]):
        raise AddendaError(f"There are {len(train[1]):,} images; {images:,} and 2,000 for validation are more.")
    return Task(_normed(*train, images, 2000, held, test), ResNet20, 12, 0.1, 128, 2)


def digits(images: int, test: int) -> Task:
    """Return scikit-learn's digits with a small net: 200 to choose by; at most 1,000 to learn from."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise AddendaError("--data digits wants scikit-learn: pip install scikit-learn.") from None
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0)).numpy()
    x, y, n = found.images[order], found.target[order], min(images, 1000)
    return Task(_normed(x, y, n, 200, (x[1200:], y[1200:]), test), Small, 40, 0.05, 64, 0)


def _normed(x, y, train: int, validation: int, held, test: int) -> dict[str, tuple[Tensor, Tensor]]:
    x, y = torch.tensor(x[: train + validation]).float()[:, None], torch.tensor(y[: train + validation]).long()
    rest = torch.tensor(held[0][:test]).float()[:, None], torch.tensor(held[1][:test]).long()
    mean, std = x[:train].mean(), x[:train].std()
    return {
        "train": ((x[:train] - mean) / std, y[:train]),
        "validation": ((x[train:] - mean) / std, y[train:]),
        "test": ((rest[0] - mean) / std, rest[1]),
    }


class Block(nn.Module):
    """Two 3 × 3 convolutions and a shortcut."""

    def __init__(self, before: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.shortcut = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet20(nn.Module):
    """He et al. 2015 for small images: nine blocks of 16, 32 and 64 channels. (batch, 1, h, w) to (batch, 10)."""

    def __init__(self):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        before = 16
        for width in (16, 32, 64):
            for number in range(3):
                layers.append(Block(before, width, 2 if number == 0 and width > 16 else 1))
                before = width
        self.layers, self.fc = nn.Sequential(*layers), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(x).mean((2, 3)))


class Small(nn.Module):
    """Three convolutions of 32, 64 and 64 channels. (batch, 1, 8, 8) to (batch, 10)."""

    def __init__(self):
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in ((1, 32), (32, 64), (64, 64)):
            layers += [nn.Conv2d(before, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.layers, self.fc = nn.Sequential(*layers, nn.MaxPool2d(2)), nn.Linear(64 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(x).flatten(1))


def varied(x: Tensor, shift: int, draw: torch.Generator) -> Tensor:
    """Each image moved by up to `shift` pixels either way, half of them flipped."""
    if not shift:
        return x
    n, _, h, w = x.shape
    padded = F.pad(x, [shift] * 4)
    down, right = torch.randint(0, 2 * shift + 1, (2, n, 1, 1), generator=draw)
    column = torch.arange(w).expand(n, 1, w)
    column = torch.where(torch.rand(n, 1, 1, generator=draw) < 0.5, column.flip(-1), column)
    return padded[torch.arange(n)[:, None, None], 0, torch.arange(h)[:, None] + down, column + right][:, None]


@torch.no_grad()
def answered(net: nn.Module, part: tuple[Tensor, Tensor]) -> str:
    """One character for each image, "1" right, "0" wrong."""
    hits = [
        net(x.contiguous(memory_format=torch.channels_last)).argmax(-1) == y
        for x, y in zip(part[0].split(500), part[1].split(500), strict=True)
    ]
    return "".join("01"[int(hit)] for hit in torch.cat(hits).tolist())
