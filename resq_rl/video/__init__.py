"""Clips of video with labels: generated, or read from files."""

from resq_rl.video.clip import IGNORE, SPLITS, Clip, Split, VideoDataset
from resq_rl.video.datasets.camvid import CamVidVideo
from resq_rl.video.datasets.cityscapes import CityscapesVideo
from resq_rl.video.datasets.davis import DavisVideo
from resq_rl.video.datasets.jhmdb import JHMDBVideo
from resq_rl.video.datasets.posetrack import PoseTrackVideo
from resq_rl.video.files import VideoFiles
from resq_rl.video.framing import Fit, Framing, framing_of
from resq_rl.video.generated.composited import CompositedVideo
from resq_rl.video.generated.figures import JOINTS, FigureVideo
from resq_rl.video.generated.objects import GeneratedObjects
from resq_rl.video.generated.video import GeneratedVideo
from resq_rl.video.generated.warped import WarpedVideo
from resq_rl.video.joined import JoinedVideo
from resq_rl.video.parts import Part
from resq_rl.video.sources import package_video
from resq_rl.video.stream import VideoStream

__all__ = [
    "IGNORE",
    "JOINTS",
    "SPLITS",
    "CamVidVideo",
    "CityscapesVideo",
    "Clip",
    "CompositedVideo",
    "DavisVideo",
    "FigureVideo",
    "Fit",
    "Framing",
    "GeneratedObjects",
    "GeneratedVideo",
    "JHMDBVideo",
    "JoinedVideo",
    "Part",
    "PoseTrackVideo",
    "Split",
    "VideoDataset",
    "VideoFiles",
    "VideoStream",
    "WarpedVideo",
    "framing_of",
    "package_video",
]
