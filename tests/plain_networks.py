"""Small convolutional and plain networks in torch, random, and their ONNX graphs.

Each has what a family of well-known networks is hard for: additions, depthwise convolutions, Concat, gates, Flatten.
"""

from __future__ import annotations

import io
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import nn


class Block(nn.Module):
    """Two convolutions around which the stream goes, with a projection where its size changes."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.Conv2d(after, after, 3, 1, 1)
        self.norm_one, self.norm_two = nn.BatchNorm2d(after), nn.BatchNorm2d(after)
        self.down = nn.Conv2d(before, after, 1, stride) if stride > 1 or before != after else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm_two(self.two(torch.relu(self.norm_one(self.one(x)))))
        return torch.relu(y + (x if self.down is None else self.down(x)))


class Residual(nn.Module):
    """ResNet: the channels of a stream are the same in all that add to it."""

    def __init__(self, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2))
        self.blocks = nn.Sequential(Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 2 * width, 1))
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Gate(nn.Module):
    """Squeeze and excite."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.squeeze, self.excite = nn.Conv2d(width, 16, 1), nn.Conv2d(16, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.excite(torch.relu(self.squeeze(self.pool(x)))))


class Inverted(nn.Module):
    """MobileNet: wide inside, where each channel has a filter of its own; a gate; an addition around it."""

    def __init__(self, width: int = 16, wide: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 2, 1)
        self.up, self.up_norm = nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.each, self.each_norm = nn.Conv2d(wide, wide, 3, 1, 1, groups=wide), nn.BatchNorm2d(wide)
        self.gate = Gate(wide)
        self.down = nn.Conv2d(wide, width, 1)
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.hardswish(self.stem(x))
        y = nn.functional.relu6(self.up_norm(self.up(x)))
        y = self.gate(nn.functional.hardswish(self.each_norm(self.each(y))))
        x = x + self.down(y)
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Flat(nn.Module):
    """VGG: a channel becomes a run of columns of the first linear."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, 1, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(32 * 16, 64),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(64, 32),
            nn.ReLU(),
            nn.Linear(32, 10),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x))


class Dense(nn.Module):
    """DenseNet: what a layer makes is put beside what it read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1)
        self.one, self.two = nn.Conv2d(16, 16, 3, 1, 1), nn.Conv2d(32, 16, 3, 1, 1)
        self.norm = nn.BatchNorm2d(48)
        self.last, self.head = nn.Conv2d(48, 24, 1), nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.cat([x, torch.relu(self.one(x))], 1)
        x = torch.cat([x, torch.relu(self.two(x))], 1)
        x = torch.relu(self.last(torch.relu(self.norm(x))))
        return self.head(torch.nn.functional.avg_pool2d(x, 16).flatten(1))


class Grouped(nn.Module):
    """ShuffleNet and U-Net: groups, channels that are shuffled or split, a transposed convolution, a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(3, 32, 3, 2, 1), nn.Conv2d(32, 32, 3, 1, 1, groups=2)
        self.mixed, self.norm = nn.Conv2d(32, 32, 1), nn.InstanceNorm2d(16, affine=True)
        self.slope = nn.PReLU(16)
        self.up, self.last = nn.ConvTranspose2d(16, 16, 2, 2), nn.Conv2d(16 + 32, 16, 3, 1, 1)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        y = torch.relu(self.grouped(x))
        y = y.reshape(-1, 2, 16, 8, 8).transpose(1, 2).reshape(-1, 32, 8, 8)
        left, right = self.mixed(y).split(16, 1)
        y = self.slope(self.norm(left)) * torch.sigmoid(right)
        x = nn.functional.interpolate(x, scale_factor=2.0)
        return self.head(torch.relu(self.last(torch.cat([self.up(y), x], 1))))


class Perceptron(nn.Module):
    """Linears only."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(24, 64), nn.GELU(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


NETWORKS: dict[str, type[nn.Module]] = {
    "residual": Residual,
    "inverted": Inverted,
    "flat": Flat,
    "dense": Dense,
    "grouped": Grouped,
    "perceptron": Perceptron,
}


def network(name: str, seed: int = 0) -> nn.Module:
    """A random network in eval mode, with norms that are not those of a fresh one."""
    torch.manual_seed(seed)
    made = NETWORKS[name]()
    for one in made.modules():
        if isinstance(one, nn.BatchNorm2d | nn.InstanceNorm2d):
            nn.init.uniform_(one.weight, 0.5, 1.5)
            nn.init.normal_(one.bias, std=0.3)
        if isinstance(one, nn.BatchNorm2d):
            assert one.running_mean is not None
            assert one.running_var is not None
            nn.init.normal_(one.running_mean, std=0.3)
            nn.init.uniform_(one.running_var, 0.5, 1.5)
    return made.eval()


def inputs(name: str, count: int, seed: int = 1) -> torch.Tensor:
    """Smooth random images, or vectors."""
    generator = torch.Generator().manual_seed(seed)
    if name == "perceptron":
        mixing = torch.randn(8, 24, generator=torch.Generator().manual_seed(7))
        return torch.randn(count, 8, generator=generator) @ mixing
    coarse = torch.randn(count, 3, 6, 6, generator=generator)
    return nn.functional.interpolate(coarse, (16, 16), mode="bilinear") + 0.1 * torch.randn(
        count, 3, 16, 16, generator=generator
    )


def export(made: nn.Module, sample: torch.Tensor, **options: Any) -> ir.Model:
    """The ONNX graph of a network, batch free."""
    file = io.BytesIO()
    torch.onnx.export(
        made,
        (sample,),
        file,
        dynamo=False,
        opset_version=18,
        input_names=["x"],
        output_names=["y"],
        dynamic_axes={"x": {0: "batch"}, "y": {0: "batch"}},
        **options,
    )
    return ir.from_proto(onnx.load_from_string(file.getvalue()))


def patterns(count: int, seed: int, kinds: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [count, 3, 16, 16] and what each shows: a pattern, shifted, over half of another, and noise."""
    shapes = torch.randn(kinds, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(seed)
    classes, others = torch.randint(0, kinds, (2, count), generator=generator)
    images = nn.functional.interpolate(shapes[classes] + 0.5 * shapes[others], (16, 16), mode="bilinear")
    shifts = torch.randint(-4, 5, (count, 2), generator=generator).tolist()
    images = torch.stack([torch.roll(one, tuple(shift), (1, 2)) for one, shift in zip(images, shifts, strict=True)])
    return images + torch.randn(images.shape, generator=generator), classes


def trained(name: str, steps: int, kinds: int = 20) -> nn.Module:
    """A network that has learned to tell patterns apart."""
    torch.manual_seed(0)
    made = NETWORKS[name]()
    *_, last = (one for one in made.modules() if isinstance(one, nn.Linear))
    parent = made.get_submodule("classifier") if name == "flat" else made
    setattr(parent, "6" if name == "flat" else "head", nn.Linear(last.in_features, kinds))
    images, classes = patterns(4000, seed=100, kinds=kinds)
    optimizer = torch.optim.AdamW(made.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    made.train()
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = torch.randint(0, len(images), (32,), generator=generator)
        loss = nn.functional.cross_entropy(made(images[batch]), classes[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return made.eval()
