from typing import Any

MAX_RATIO: int

def smart_nframes(ele: dict[str, Any], total_frames: int, video_fps: float) -> int: ...
