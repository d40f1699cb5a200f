"""The joint step in PyTorch, as a competent user would write it: the peer of lclseg's.

Same architecture, losses, batch and augmentation; channels_last, vectorised, fused Adam. New arrays
are made on PyTorch's default device. Letters:
B labelled slices, P pairs, H W pixels, N = H W, C classes, c = C - 1, E embedding, K anchors.
"""

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

FILTERS = (16, 32, 64, 128, 128, 128)


class ConvBlock(nn.Module):
    """Convolution, BatchNorm, ReLU, after nearest upsampling for a 2 x 2 kernel."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int = 3):
        super().__init__()
        self.kernel_size = kernel_size
        padding = 0 if kernel_size == 2 else kernel_size // 2
        self.conv = nn.Conv2d(inputs, outputs, kernel_size, padding=padding, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01)

    def forward(self, x):
        if self.kernel_size == 2:
            x = F.pad(F.interpolate(x, scale_factor=2.0, mode="nearest"), (0, 1, 0, 1))
        return F.relu(self.norm(self.conv(x)), inplace=True)


class UNet(nn.Module):
    """lclseg.models.UNet; blocks in the order in which Flax numbers them."""

    def __init__(self, num_classes: int, filters=FILTERS, embedding_dim: int = 16):
        super().__init__()
        blocks, inputs = [], 1
        for f in filters:
            blocks += [ConvBlock(inputs, f), ConvBlock(f, f)]
            inputs = f
        for level, f in reversed(list(enumerate(filters[:-1]))):
            blocks += [ConvBlock(inputs, f, kernel_size=2), ConvBlock(2 * f, f)]
            blocks += [ConvBlock(f, f)] if level else []
            inputs = f
        self.levels = len(filters)
        self.trunk_blocks = nn.ModuleList(blocks)
        self.head_blocks = nn.ModuleList([ConvBlock(inputs, 16), ConvBlock(16, 16)])
        self.head = nn.Conv2d(16, num_classes, 3, padding=1, bias=False)
        self.projection_block = ConvBlock(inputs, embedding_dim, kernel_size=1)
        self.projection = nn.Conv2d(embedding_dim, embedding_dim, 1, bias=False)

    def trunk(self, x):
        blocks, skips = iter(self.trunk_blocks), []
        for level in range(self.levels):
            if level:
                skips.append(x)
                x = F.max_pool2d(x, 2)
            x = next(blocks)(x)
            x = next(blocks)(x)
        for level in reversed(range(self.levels - 1)):
            x = torch.cat([skips[level], next(blocks)(x)], dim=1)
            x = next(blocks)(x)
            x = next(blocks)(x) if level else x
        return x

    def segment(self, features):
        for block in self.head_blocks:
            features = block(features)
        return self.head(features)

    def project(self, features):
        return self.projection(self.projection_block(features))


def flax_names(net: UNet) -> dict[str, nn.Parameter]:
    """Path of a parameter in Flax, joined by /, -> the parameter here."""
    names = {
        "segmentation_head/Conv_0/kernel": net.head.weight,
        "projection_head/Dense_0/kernel": net.projection.weight,
    }
    groups = {
        "unet_trunk": net.trunk_blocks,
        "segmentation_head": net.head_blocks,
        "projection_head": [net.projection_block],
    }
    for group, blocks in groups.items():
        for i, block in enumerate(blocks):
            prefix = f"{group}/ConvBlock_{i}"
            layer = "UpsampleConv_0" if block.kernel_size == 2 else "Conv_0"
            names[f"{prefix}/{layer}/kernel"] = block.conv.weight
            names[f"{prefix}/BatchNorm_0/scale"] = block.norm.weight
            names[f"{prefix}/BatchNorm_0/bias"] = block.norm.bias
    return names


def from_flax(value: np.ndarray) -> torch.Tensor:
    """Kernels [h, w, in, out] or [in, out] -> [out, in, h, w]; vectors as they are."""
    value = torch.from_numpy(np.array(value))
    if value.ndim == 2:
        value = value[None, None]
    return value.permute(3, 2, 0, 1).contiguous() if value.ndim == 4 else value


def load_flax(net: UNet, params) -> None:
    """Copies all parameters from arrays under their Flax names; none may be left over."""
    names = flax_names(net)
    if set(names) != set(params):
        raise ValueError(f"parameters differ: {sorted(set(names) ^ set(params))}")
    with torch.no_grad():
        for name, parameter in names.items():
            parameter.copy_(from_flax(params[name]))


def dice_loss(logits, labels):
    """Soft Dice, background included, per image and class; logits [B, C, H, W]."""
    probs = logits.softmax(dim=1)
    onehot = F.one_hot(labels, logits.shape[1]).permute(0, 3, 1, 2).to(probs.dtype)
    overlap = (probs * onehot).sum((2, 3))
    total = probs.sum((2, 3)) + onehot.sum((2, 3))
    return 1 - ((2 * overlap + 1e-5) / (total + 1e-5)).mean()


def sample_anchors(labels, *, num_classes: int, pixels_per_class: int):
    """[P, 2, N] int64 -> pixel numbers [P, 2, c, K]; arbitrary ones for an absent class."""
    weights = F.one_hot(labels, num_classes)[..., 1:].transpose(2, 3).float()
    weights = weights + (weights.sum(-1, keepdim=True) == 0)
    flat = weights.reshape(-1, labels.shape[-1])
    drawn = torch.multinomial(flat, pixels_per_class, replacement=True)
    return drawn.reshape(*weights.shape[:3], pixels_per_class)


def contrastive_loss(z, labels, anchors, *, num_classes: int, temperature: float = 0.1):
    """`inter` local contrastive loss, mean over pairs that show a class, vectorised.

    z [P, 2, N, E], labels [P, 2, N] int64, anchors [P, 2, c, K] pixel numbers or None: all pixels.
    """
    num_pairs, _, _, dim = z.shape
    num_foreground = num_classes - 1
    onehot = F.one_hot(labels, num_classes)[..., 1:].to(z.dtype)
    counts = onehot.sum(2)
    present = counts > 0
    means = onehot.transpose(2, 3) @ z / counts.clamp(min=1)[..., None]
    references = F.normalize(means, dim=-1).reshape(num_pairs, 1, 2 * num_foreground, dim)
    if anchors is None:
        anchor_z, weights = z, onehot / counts.clamp(min=1)[:, :, None]
    else:
        index = anchors.reshape(num_pairs, 2, -1)
        anchor_z = z.gather(2, index[..., None].expand(-1, -1, -1, dim))
        weights = torch.eye(num_foreground, dtype=z.dtype) / anchors.shape[-1]
        weights = weights.repeat_interleave(anchors.shape[-1], dim=0)
        weights = weights * present[:, :, None]
    anchor_z = F.normalize(anchor_z, dim=-1)
    similarity = anchor_z @ references.transpose(2, 3) / temperature
    visible = present.reshape(num_pairs, 1, 1, -1)
    log_denominator = similarity.masked_fill(~visible, -1e9).logsumexp(-1, keepdim=True)
    weights = weights.transpose(2, 3)
    denominators = (weights @ log_denominator)[..., 0]  # [P, 2, c]
    attraction = weights @ anchor_z @ references.transpose(2, 3) / temperature
    attraction = attraction.reshape(num_pairs, 2, num_foreground, 2, num_foreground)
    attraction = attraction.diagonal(dim1=2, dim2=4).transpose(2, 3)  # [P, image, c, reference]
    terms = denominators[..., None] - attraction
    valid = present[..., None] & present.transpose(1, 2)[:, None]
    per_pair = (terms * valid).sum((1, 2, 3)) / valid.sum((1, 2, 3)).clamp(min=1)
    return per_pair.sum() / present.any((1, 2)).sum().clamp(min=1)


def contrastive_loss_loop(z, labels, anchors, *, num_classes: int, temperature: float = 0.1):
    """The same, straight from the equation: loops over pairs, images, classes and anchors."""

    def similarity(a, b):
        return F.cosine_similarity(a, b, dim=-1) / temperature

    pair_losses = []
    for pair in range(len(z)):
        means = [
            {k: z[pair, i][labels[pair, i] == k].mean(0) for k in labels[pair, i].unique().tolist()}
            for i in range(2)
        ]
        references = torch.stack([m for image in means for k, m in image.items() if k > 0])
        terms = []
        for i in range(2):
            for k in range(1, num_classes):
                if k not in means[i]:
                    continue
                for pixel in anchors[pair, i, k - 1]:
                    anchor = z[pair, i, pixel]
                    denominator = torch.logsumexp(similarity(anchor[None], references), dim=0)
                    for image in means:
                        if k in image:
                            # Each positive counts the same, however many anchors it meets.
                            terms.append(denominator - similarity(anchor, image[k]))
        pair_losses.append(torch.stack(terms).mean())
    return torch.stack(pair_losses).mean()


def warp(image, label, matrix, displacement):
    """Image [B, H, W] linearly and label [B, H, W] by nearest neighbour, 0 outside.

    matrix [B, 2, 2], output to input about the centre, rows first; displacement [B, 2, H, W] px.
    """
    height, width = image.shape[1:]
    rows = torch.arange(height) - (height - 1) / 2
    columns = torch.arange(width) - (width - 1) / 2
    points = torch.stack(torch.meshgrid(rows, columns, indexing="ij")) + displacement
    points = torch.einsum("bij,bjhw->bhwi", matrix, points)
    grid = points.flip(-1) / torch.tensor([(width - 1) / 2, (height - 1) / 2])
    image = F.grid_sample(image[:, None], grid, mode="bilinear", align_corners=True)[:, 0]
    label = F.grid_sample(label[:, None].float(), grid, mode="nearest", align_corners=True)[:, 0]
    return image, label.to(torch.int64)


def _uniform(low: float, high: float, *shape: int):
    return torch.empty(*shape).uniform_(low, high)


def draw_warp(num_slices: int, size: int):
    """Random (matrix, displacement) per slice: METHOD's affine kinds, and elastic for a half."""
    kind = torch.randint(5, (num_slices,))
    eighths = torch.randint(8, (num_slices,)) * (torch.pi / 4)
    small = torch.deg2rad(_uniform(-15, 15, num_slices))
    angle = torch.where(kind == 0, small, torch.where(kind == 3, eighths, 0.0))
    scale = torch.where(kind == 1, 1 / _uniform(0.95, 1.05, num_slices), 1.0)
    flip = torch.where((kind == 2) & (torch.rand(num_slices) < 0.5), -1.0, 1.0)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    matrix = torch.stack([cos, sin, -sin * flip, cos * flip], dim=-1).reshape(-1, 2, 2)
    nodes = 0.026 * size * torch.randn(num_slices, 2, 3, 3)
    field = F.interpolate(nodes, size=(size, size), mode="bicubic")
    return matrix, field * (torch.rand(num_slices, 1, 1, 1) < 0.5)


def jitter(image, contrast: tuple[float, float], brightness: float):
    """image * contrast + brightness, one draw per slice."""
    shape = (len(image), 1, 1)
    return image * _uniform(*contrast, *shape) + _uniform(-brightness, brightness, *shape)


def augment(batch: dict) -> dict:
    """Labelled slices moved and jittered; views jittered and clipped."""
    image, label = batch["image"], batch["label"]
    image, label = warp(image, label, *draw_warp(len(image), image.shape[-1]))
    views = batch["pair_image"].flatten(0, 1)
    views = jitter(views, (0.7, 1.3), 0.3).clamp(0, 1.5).reshape(batch["pair_image"].shape)
    return {**batch, "image": jitter(image, (0.8, 1.2), 0.1), "label": label, "pair_image": views}


def losses(
    net: UNet,
    batch: dict,
    *,
    num_classes: int,
    pixels_per_class: int | None,
    dtype: torch.dtype | None = None,
):
    """(segmentation loss, contrastive loss) of one forward pass over labelled slices and views.

    `dtype`: of the network's computation, but for what PyTorch's autocast leaves in float32; None:
    that of its parameters. The losses are float32 at least.
    """
    num_labeled = len(batch["image"])
    images = torch.cat([batch["image"], batch["pair_image"].flatten(0, 1)])[:, None]
    with torch.autocast(images.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        features = net.trunk(images.contiguous(memory_format=torch.channels_last))
        logits = net.segment(features[:num_labeled])
        z = net.project(features[num_labeled:])
    if dtype is not None:
        logits, z = logits.float(), z.float()
    labels = batch["pair_label"].flatten(2)
    z = z.permute(0, 2, 3, 1).reshape(*labels.shape, z.shape[1])
    anchors = None
    if pixels_per_class:
        anchors = sample_anchors(labels, num_classes=num_classes, pixels_per_class=pixels_per_class)
    contrastive = contrastive_loss(z, labels, anchors, num_classes=num_classes)
    return dice_loss(logits, batch["label"]), contrastive


def train_step(
    net: UNet,
    optimizer,
    batch: dict,
    *,
    num_classes: int,
    weight: float,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """One joint step: augmentation, forward, backward, Adam; returns the loss, not waited for."""
    segmentation, contrastive = losses(
        net, augment(batch), num_classes=num_classes, pixels_per_class=3, dtype=dtype
    )
    loss = segmentation + weight * contrastive
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()


def load_batch(path) -> dict:
    """A batch saved as .npz, labels as int64."""
    with np.load(path) as arrays:
        batch = {name: torch.from_numpy(arrays[name]) for name in arrays}
    return {k: v.to(torch.int64) if "label" in k else v for k, v in batch.items()}
