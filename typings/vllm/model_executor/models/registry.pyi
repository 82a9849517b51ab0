from collections.abc import Callable
from typing import Any

# a function of vLLM's, declared as a variable because serve puts another in its place
_run_in_subprocess: Callable[[Callable[[], Any]], Any]
