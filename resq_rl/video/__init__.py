"""Clips of video with labels: generated, or read from files."""

from resq_rl.video.camvid import CamVidVideo
from resq_rl.video.clip import IGNORE, SPLITS, Clip, Split, VideoDataset
from resq_rl.video.davis import DavisVideo
from resq_rl.video.figures import JOINTS, FigureVideo
from resq_rl.video.files import VideoFiles, package_video
from resq_rl.video.generated import GeneratedVideo
from resq_rl.video.parts import Part

__all__ = [
    "IGNORE",
    "JOINTS",
    "SPLITS",
    "CamVidVideo",
    "Clip",
    "DavisVideo",
    "FigureVideo",
    "GeneratedVideo",
    "Part",
    "Split",
    "VideoDataset",
    "VideoFiles",
    "package_video",
]
