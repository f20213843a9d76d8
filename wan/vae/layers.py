"""The layers of Wan's VAE for frames that come in pieces: convolutions over time that remember the frames before.

A piece [B, C, T, H, W] lies in memory with its channels last (channels_last_3d), so that every pixel's channels are
neighbours: norms read them at once, and convolutions and attention take them as they are. A convolution sees the frames
before (wan.vae.feature_cache) and the new ones in one buffer, into which the norm writes directly; rows and columns are
padded by the convolution itself.

Parameters have the names of Diffusers' AutoencoderKLWan. This file does not know the order of the layers.
Source: Wan 2.1 (arXiv 2503.20314), section 4.1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.vae.feature_cache import FeatureCache, empty, put
from wan.vae.norm import RMSNorm

CUBE = (3, 3, 3)


def run(layers: Sequence[nn.Module], x: Tensor, history: FeatureCache) -> Tensor:
    """The layers on the next piece [B, C, T, H, W] of a video, each called as layer(x, history)."""
    history.begin()
    for layer in layers:
        x = layer(x, history)
    history.end()
    return x


class CausalConv3d(nn.Conv3d):
    """A convolution that sees the kernel's length less 1 of the frames before.

    `conv3d_as_conv2d`: computed as a sum over the kernel's planes, each of which is a convolution of images. PyTorch's
    CPU kernels for images are several times faster where pieces are short or channels no multiple of 16, and never
    slower; the sum rounds in another order. It needs no window, so takes less memory; which frame is kept where changes
    from call to call, so that calls cannot be recorded.
    """

    conv3d_as_conv2d = False

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int | tuple[int, int, int], stride: int = 1
    ) -> None:
        """`stride` over time."""
        sides = (kernel,) * 3 if isinstance(kernel, int) else kernel
        padding = (0, sides[1] // 2, sides[2] // 2)
        super().__init__(channels_in, channels_out, sides, (stride, 1, 1), padding)

    def forward(  # type: ignore[override]  # as every layer here
        self, x: Tensor, history: FeatureCache, norm: RMSNorm | None = None
    ) -> Tensor:
        """[B, C, T, H, W] to [B, C', T, H, W] at stride 1. With `norm`, of silu(norm(x))."""
        if self.conv3d_as_conv2d and self.before:
            return self._as_conv2d(x, history, norm)
        return self.convolved(history.window(x, self.before, norm) if self.before else x)

    def _as_conv2d(self, x: Tensor, history: FeatureCache, norm: RMSNorm | None) -> Tensor:
        """As the convolution of a window, without its memory. What is kept is the narrower: frames that go in, or sums
        that come out and that later frames complete."""
        narrowing = self.out_channels < self.in_channels
        kept = history.frames(x[:, : self.out_channels] if narrowing else x, self.before)
        step = self._complete if narrowing else self._total
        made = [step(frame, kept, norm).unsqueeze(2) for frame in torch.split(x, 1, dim=2)]
        return made[0] if len(made) == 1 else torch.cat(made, dim=2)

    def _total(self, frame: Tensor, kept: list[Tensor], norm: RMSNorm | None) -> Tensor:
        """The sum [B, C', H, W] over the frames before and this one [B, C, 1, H, W], which takes the memory of the
        oldest, once that is done."""
        total = self._plane(kept[0], 0, self.bias)
        kept.append(kept.pop(0))
        put(frame, kept[-1].unsqueeze(2), norm)
        for k, before in enumerate(kept, 1):
            total += self._plane(before, k)
        return total

    def _complete(self, frame: Tensor, sums: list[Tensor], norm: RMSNorm | None) -> Tensor:
        """The oldest sum [B, C', H, W] with the part of this frame [B, C, 1, H, W]; the later ones get theirs."""
        window = empty(frame, 1)
        put(frame, window, norm)
        new, last = window[:, :, 0], len(sums)
        total = self._plane(new, last, self.bias).add_(sums[0])
        sums.append(sums.pop(0).zero_())
        for place, later in enumerate(sums, 1):
            later += self._plane(new, last - place)
        return total

    @property
    def before(self) -> int:
        """How many of the frames before it sees."""
        return self.kernel_size[0] - self.stride[0]

    def convolved(self, window: Tensor) -> Tensor:
        """Without history: [B, C, T + kernel - 1, H, W] to [B, C', T, H, W]."""
        if not self.conv3d_as_conv2d:
            return super().forward(window)
        stride = self.stride[0]
        stop = window.shape[2] - self.kernel_size[0] + 1
        total = self._plane(as_frames(window[:, :, :stop:stride]), 0, self.bias)
        for k in range(1, self.kernel_size[0]):
            total += self._plane(as_frames(window[:, :, k : stop + k : stride]), k)
        return as_video(total, window.shape[0])

    def _plane(self, images: Tensor, k: int, bias: Tensor | None = None) -> Tensor:
        """The part of the kernel's plane k, [N, C, H, W] to [N, C', H, W]."""
        return F.conv2d(images, self.weight[:, :, k], bias, padding=self.padding[1:])

    def use_conv3d_as_conv2d(self, on: bool) -> None:
        """Set `conv3d_as_conv2d`, and put the weights in memory as it takes them: plane by plane, or channels last."""
        self.conv3d_as_conv2d = on
        order, back = ((2, 0, 3, 4, 1), (1, 4, 0, 2, 3)) if on else ((0, 2, 3, 4, 1), (0, 4, 1, 2, 3))
        self.weight.data = self.weight.data.permute(order).contiguous().permute(back)


class ResidualBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(channels_in, 3)
        self.conv1 = CausalConv3d(channels_in, channels_out, CUBE)
        self.norm2 = RMSNorm(channels_out, 3)
        self.conv2 = CausalConv3d(channels_out, channels_out, CUBE)
        self.conv_shortcut = CausalConv3d(channels_in, channels_out, (1, 1, 1)) if channels_in != channels_out else None

    def forward(self, x: Tensor, history: FeatureCache) -> Tensor:
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x, history)
        x = self.conv1(x, history, self.norm1)
        x = self.conv2(x, history, self.norm2)
        return x.add_(shortcut)


class AttentionBlock(nn.Module):
    """Every pixel of a frame attends to all pixels of that frame, with one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, history: FeatureCache) -> Tensor:
        frames = as_frames(x)
        tokens = self.norm(frames).permute(0, 2, 3, 1).flatten(1, 2).unsqueeze(1)  # [B·T, 1, H·W, C]
        q, k, v = _linear(self.to_qkv, tokens).chunk(3, dim=-1)
        attended = _linear(self.proj, F.scaled_dot_product_attention(q, k, v))
        batch, channels, count, height, width = x.shape
        return x + attended.view(batch, count, height, width, channels).permute(0, 4, 1, 2, 3)


def _linear(convolution: nn.Conv2d, tokens: Tensor) -> Tensor:
    return F.linear(tokens, convolution.weight.flatten(1), convolution.bias)


def as_frames(x: Tensor) -> Tensor:
    """[B, C, T, H, W] as images [B·T, C, H, W]; a view where the channels are last."""
    return x.transpose(1, 2).flatten(0, 1)


def as_video(frames: Tensor, batch: int) -> Tensor:
    """The reverse of `as_frames`."""
    return frames.view(batch, -1, *frames.shape[1:]).transpose(1, 2)


class MidBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([AttentionBlock(channels)])
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels) for _ in range(2)])

    def forward(self, x: Tensor, history: FeatureCache) -> Tensor:
        for layer in (self.resnets[0], self.attentions[0], self.resnets[1]):
            x = layer(x, history)
        return x


class Upsample(nn.Module):
    """Twice as high and wide with half of the channels, and, if `time`, twice as many frames.

    The first frame of a video stays one, and the frames after it do not see it over time.
    """

    def __init__(self, channels: int, time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(channels, channels // 2, 3, padding=1))
        self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1)) if time else None

    def forward(self, x: Tensor, history: FeatureCache) -> Tensor:
        batch = x.shape[0]
        if self.time_conv is not None and history.first:
            history.pass_over(x, self.time_conv.before)
        if self.time_conv is None or history.first:
            frames = as_frames(x).unsqueeze(1)
        else:  # channels come out as two frames: [B, 2·C, T, H, W] to [B·T, 2, C, H, W]
            frames = as_frames(self.time_conv(x, history))
            frames = frames.view(frames.shape[0], 2, -1, *frames.shape[2:])
        return as_video(self.resample[1](doubled(frames)), batch)


def doubled(frames: Tensor) -> Tensor:
    """[N, K, C, H, W] to [N·K, C, 2·H, 2·W], every pixel four times, in one copy that leaves the channels last."""
    count, parts, channels, height, width = frames.shape
    pixels = frames.permute(0, 1, 3, 4, 2)[:, :, :, None, :, None]
    doubled = pixels.expand(count, parts, height, 2, width, 2, channels)
    return doubled.reshape(count * parts, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)


class Downsample(nn.Module):
    """Half as high and wide and, if `time`, half as many frames; the first frame of a video stays one."""

    def __init__(self, channels: int, time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        self.time_conv = CausalConv3d(channels, channels, (3, 1, 1), stride=2) if time else None

    def forward(self, x: Tensor, history: FeatureCache) -> Tensor:
        x = as_video(self.resample(as_frames(x)), x.shape[0])
        if self.time_conv is None:
            return x
        window = history.window(x, self.time_conv.before)
        return x if history.first else self.time_conv.convolved(window)
