"""Clips of video with labels: generated, or read from files."""

from resq_rl.video.camvid import CamVidVideo
from resq_rl.video.cityscapes import CityscapesVideo
from resq_rl.video.clip import IGNORE, SPLITS, Clip, Split, VideoDataset
from resq_rl.video.davis import DavisVideo
from resq_rl.video.figures import JOINTS, FigureVideo
from resq_rl.video.files import VideoFiles, package_video
from resq_rl.video.generated import GeneratedVideo
from resq_rl.video.generated_objects import GeneratedObjects
from resq_rl.video.jhmdb import JHMDBVideo
from resq_rl.video.parts import Part
from resq_rl.video.posetrack import PoseTrackVideo
from resq_rl.video.stream import VideoStream
from resq_rl.video.warped import WarpedVideo

__all__ = [
    "IGNORE",
    "JOINTS",
    "SPLITS",
    "CamVidVideo",
    "CityscapesVideo",
    "Clip",
    "DavisVideo",
    "FigureVideo",
    "GeneratedObjects",
    "GeneratedVideo",
    "JHMDBVideo",
    "Part",
    "PoseTrackVideo",
    "Split",
    "VideoDataset",
    "VideoFiles",
    "VideoStream",
    "WarpedVideo",
    "package_video",
]
