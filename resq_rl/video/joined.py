"""Several datasets as one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from resq_rl.errors import VideoError
from resq_rl.video.clip import Clip, Split, VideoDataset, check_split
from resq_rl.video.framing import Framing, framing_of

__all__ = ["JoinedVideo"]


@dataclass(frozen=True)
class JoinedVideo:
    """The clips of several datasets, one dataset after another in every split.

    Attributes:
        sources: datasets that have all three splits, the same classes and the same framing; names, if given, are for
            settings that change one of them.

    Raises:
        VideoError: there are none, or their classes or framings differ.
    """

    sources: Mapping[str, VideoDataset] | Sequence[VideoDataset]

    def __post_init__(self) -> None:
        if not self.sources:
            raise VideoError("JoinedVideo needs at least one dataset, got none. Add one to sources.")
        first = self._datasets[0]
        for number, other in enumerate(self._datasets):
            kinds = ((first.classes, other.classes, "classes"), (framing_of(first), framing_of(other), "framing"))
            for wanted, found, what in kinds:
                if found != wanted:
                    raise VideoError(
                        f"Datasets of JoinedVideo must have the same {what}: source 0 has {wanted} and source {number} "
                        f"has {found}. Give them the same settings, or use one alone."
                    )

    @property
    def _datasets(self) -> list[VideoDataset]:
        return list(self.sources.values() if isinstance(self.sources, Mapping) else self.sources)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names of every source."""
        return self._datasets[0].classes

    @property
    def framing(self) -> Framing:
        """The framing of every source."""
        return framing_of(self._datasets[0])

    def clips(self, split: Split) -> list[Clip]:
        """The clips of a split of every source.

        Raises:
            VideoError: a source cannot give the split, or two clips have the same name.
        """
        clips = [clip for source in self._datasets for clip in source.clips(check_split(split))]
        names = [clip.name for clip in clips]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise VideoError(
                f"Clips of JoinedVideo must have different names, got {twice[0]!r} more than once. Take the clip out "
                "of all sources but one."
            )
        return clips
