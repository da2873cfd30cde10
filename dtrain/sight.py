"""What a cluster sees of a run, where it knows more than the run's folder does."""

from typing import Literal

from dtrain.settings import Settings

Phase = Literal["queued", "pulling", "starting", "running", "checkpointing", "recovering", "ended", "unknown"]


class Sight(Settings):
    """What a cluster sees of a run at this moment."""

    phase: Phase
    why: str = ""
    """One sentence: what it waits for, or why it ended."""
    is_over: bool = False
    """Nothing of it runs on the cluster any more, and nothing will without another submit."""
    succeeded: bool | None = None
    """Once it is over, where the cluster knows."""

    @property
    def brings_back(self) -> bool:
        """Whether the cluster will start a driver, once there is room: a run whose own is gone is not lost yet."""
        return self.phase in ("queued", "starting", "pulling", "recovering") and not self.is_over
